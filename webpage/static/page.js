"use strict";
// Without this script the form still works, and a page of a run loads itself again. With it, sliders answer as they
// are moved, a recipe is copied, and a run is followed.

const parsed = (html) => [...new DOMParser().parseFromString(html, "text/html").body.childNodes];

function question(form) {
  const answer = document.getElementById("answer");
  const state = document.getElementById("state");
  let asking = null;
  let timer = 0;

  async function ask() {
    const fields = new URLSearchParams(new FormData(form));
    if (!fields.get("model").trim() && !fields.get("config").trim()) return;
    asking?.abort();
    const own = (asking = new AbortController());
    answer.classList.add("busy");
    state.textContent = "estimating…";
    try {
      const given = await fetch("/answer", { method: "POST", body: fields, signal: own.signal });
      const html = await given.text();
      if (own !== asking) return;
      answer.replaceChildren(...parsed(html));
      state.textContent = given.ok ? "estimated" : "that did not work";
      copies(answer);
      remember(fields);
    } catch (error) {
      if (own !== asking || error.name === "AbortError") return;
      state.textContent = "the page does not answer: is bigpipe ui still running?";
    }
    answer.classList.remove("busy");
  }

  function remember(fields) {
    if (fields.get("config").trim()) return;
    fields.delete("form_token");
    for (const [name, value] of [...fields]) if (!value.trim()) fields.delete(name, value);
    history.replaceState(null, "", "/?" + fields);
  }

  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(ask, 200);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    ask();
  });
  form.addEventListener("change", soon);
  for (const slider of form.querySelectorAll("input[type=range]")) {
    const field = document.getElementById(slider.dataset.for);
    const follow = () => {
      slider.value = Math.round(Math.log2(Math.max(1, field.value)));
      slider.setAttribute("aria-valuetext", field.value);
    };
    slider.hidden = false;
    follow();
    field.addEventListener("input", follow);
    slider.addEventListener("input", () => {
      field.value = 2 ** slider.value;
      slider.setAttribute("aria-valuetext", field.value);
      soon();
    });
  }
}

function copies(within) {
  for (const button of within.querySelectorAll("[data-copy]")) {
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      button.textContent = "Copied";
    });
  }
}

function follow(place) {
  const events = new EventSource(place.dataset.events);
  const show = (event) => {
    const log = place.querySelector(".log");
    const atEnd = !log || log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
    const focused = place.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    place.replaceChildren(...parsed(event.data));
    const next = place.querySelector(".log");
    if (next && atEnd) next.scrollTop = next.scrollHeight;
    if (focused) place.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  };
  events.addEventListener("now", show);
  events.addEventListener("over", (event) => {
    events.close();
    show(event);
  });
}

const form = document.getElementById("question");
if (form) question(form);
copies(document);
const place = document.querySelector("[data-events]");
if (place) follow(place);
