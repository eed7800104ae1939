"""How well a model foresees a text, and how far it is from another model: perplexity, divergence, agreement.

    read_texts     files → one text
    tokenize       the text → tokens, with what they stand for in bytes
    windows_of     tokens → windows, each token scored once
    bind_windows   one or two loaded models → numbers of a window; logits live as long as their window
    summarise      numbers of all windows → metrics with their standard errors

A window is a row of `inference`: computed once whatever the ranks, and not again after a crash.
"""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .evaluating import Question, bind, conclude, evaluate, prepare, tokens_in
    from .layers import LayerLoss, Layers, lose_least
    from .placing import Known, at_work, comparing, place_pair, together_windows
    from .reporting import REPORT, render, write_report
    from .summary import Comparison, Divergence, Evaluation, Measured, summarise
    from .texts import read_texts
    from .windows import Tokens, Window, check_windows, plan_windows, tokenize, windows_of
    from .working import Pair, bind_windows

__getattr__, __all__ = face(__name__)
