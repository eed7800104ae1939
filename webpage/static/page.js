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
    if (!fields.get("model").trim() && !fields.get("config").trim()) {
      state.textContent = "name a model, or paste a config.json";
      return;
    }
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
    const shown = answer.querySelector("h2");
    document.title = (shown ? shown.textContent + ": " : "") + "what a model needs";
    const pasted = fields.get("config").trim(); // too long for an address
    fields.delete("form_token");
    for (const [name, value] of [...fields]) if (!value.trim()) fields.delete(name, value);
    history.replaceState(null, "", pasted ? "/" : "/?" + fields);
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
  // What did not change stays as it is: it may have the focus, be scrolled, be pressed or be read aloud just now.
  const events = new EventSource(place.dataset.events);
  const lost = document.getElementById("lost");
  const log = () => place.querySelector(".log");
  const isLog = (part) => part.matches(".log");
  const isRegion = (part) => part.matches("[role=region][aria-label]");
  const named = (part) => part.tagName + (part.getAttribute("aria-label") || part.getAttribute("action") || part.getAttribute("role"));

  function put(before, part) {
    if (before.outerHTML === part.outerHTML) return;
    if (isLog(part)) before.textContent = part.textContent;
    else if (isRegion(part)) before.replaceChildren(...part.childNodes);
    else before.replaceWith(part);
  }

  if (log()) log().scrollTop = log().scrollHeight;
  const show = (event) => {
    const atEnd = !log() || log().scrollTop + log().clientHeight >= log().scrollHeight - 4;
    const next = parsed(event.data).filter((part) => part.nodeType === Node.ELEMENT_NODE);
    let before = place.firstElementChild;
    for (const part of next) {
      let same = before;
      while (same && named(same) !== named(part)) same = same.nextElementSibling;
      if (!same) {
        place.insertBefore(part, before);
        continue;
      }
      while (before !== same) {
        const gone = before;
        before = before.nextElementSibling;
        gone.remove();
      }
      before = same.nextElementSibling;
      put(same, part);
    }
    while (before) {
      const gone = before;
      before = before.nextElementSibling;
      gone.remove();
    }
    if (log() && atEnd) log().scrollTop = log().scrollHeight;
    document.title = document.title.replace(/: [^:]*$/, ": " + place.querySelector("[role=status] strong").textContent);
  };
  events.addEventListener("now", show);
  events.addEventListener("over", (event) => {
    events.close();
    show(event);
  });
  events.addEventListener("open", () => (lost.textContent = ""));
  events.addEventListener("error", () => {
    lost.textContent = events.readyState === EventSource.CLOSED
      ? "This page hears nothing more of the run: load it again."
      : "The page does not answer: is bigpipe ui still running?";
  });
}

const form = document.getElementById("question");
if (form) question(form);
copies(document);
const place = document.querySelector("[data-events]");
if (place) follow(place);
