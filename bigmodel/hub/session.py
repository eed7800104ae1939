"""The session of a process that is bigpipe's own: certificates are loaded when a connection first needs them.

Loading the machine's hundred or more certificates takes as long as everything else that an estimate does. A mirror in
plain HTTP never needs them, and for the others a thread loads them while the rest is imported.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from .repository import Hub


class CertificatesInTime(ssl.SSLContext):
    """`httpx2`'s own context, made when the first connection asks for TLS; by its rules (`SSL_CERT_FILE`…)."""

    _making = threading.Lock()

    @cached_property
    def _whole(self) -> ssl.SSLContext:
        with self._making:
            if "_whole" in self.__dict__:
                made: ssl.SSLContext = self.__dict__["_whole"]
                return made
            import httpx2

            made = self.__dict__["_whole"] = httpx2.create_ssl_context()
            return made

    def load(self) -> None:
        """What a connection would wait for, done now."""
        _ = self._whole

    def set_alpn_protocols(self, protocols: Any) -> None:
        self._whole.set_alpn_protocols(protocols)

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        return self._whole.wrap_socket(*arguments, **options)

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self._whole.wrap_bio(*arguments, **options)


def own_session(models: Sequence[str]) -> None:
    """Have `huggingface_hub` make its client with such a context, where a model is asked of the Hub.

    For a process that nobody else configures. The client is otherwise what `huggingface_hub` makes itself; where its
    ways have changed, it is left to them. Loading starts at once where the Hub is asked by https.
    """
    if all(os.path.exists(model) for model in models):
        return
    try:
        import httpx2
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import hf_request_event_hook
    except ImportError:
        return
    hub = Hub.from_environment()
    context = CertificatesInTime(ssl.PROTOCOL_TLS_CLIENT)
    if hub.endpoint.startswith("https:") and not hub.offline:
        threading.Thread(target=context.load, name="certificates", daemon=True).start()
    hooks: dict[str, list[Any]] = {"request": [hf_request_event_hook]}
    set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None, verify=context))
