r"""Themis: a reward model that uses tools before it judges.

Li, Chai, Wang, Sun, Tian, Zhang, Wu, "Tool-Augmented Reward Modeling", ICLR 2024, arXiv 2310.01045.

The idea: a reward model that scores from its weights alone cannot multiply, run code, or know a date. This one first
writes a thought, calls a tool and reads what comes back (up to three times), writes a rationale, and only then gives a
number: a linear head on the hidden state of the last token of that text. So the reward is r(x, y, c), where x is the
question, y the answer and c the trace.

.. math::

    L = L_{RM} + \alpha \Big( \sum_t \big( L_{tool}(t) + \beta L_{obs}(t) \big) + \omega L_{rationale} \Big)
    \qquad
    L_{RM} = -\log \sigma\big( r(x, y_w, c_w) - r(x, y_l, c_l) \big)

Symbols and arguments: α ``alpha``, β ``beta``, ω ``omega`` of `ThemisLoss`; w and l the better and the worse answer,
which are the first and the second half of a batch. L_tool, L_obs and L_rationale are next-token losses on the parts of
a trace that the model writes itself, that the tool answers, and that explain.

Where the paper and the authors' code differ, and what is done here:

* The code adds *one* next-token mean over all unmasked tokens of both traces and 0.5 L_RM. That is
  ``ThemisLoss(form="code")``, the default, with both weights as arguments; ``form="paper"`` is the equation, each part
  the mean over its tokens (the paper gives no normalisation). β = 0 and ω = 0 take the part out of either.
* Of the better answer, the code also learns the answer itself; ``ThemisCollator(imitate=False)`` does not.
* The hidden state is read at the last attended position, so that padding on either side is fine. The code reads the
  last position and pads on the left.
* Generation goes on right behind ``<start_tool>`` and ``<start_work>``. The code puts a space there, which with many
  tokenizers is a token that never stands there in training.
* The three tokens are taken out of questions, answers and observations before a judge reads them: an answer could else
  write a trace, or a rationale, of its own. The code does not.
* Between rounds keys and values are kept (``run_traces(reuse_cache=True)``); the code reads the whole text again.
* Tools here run: see `ToolBank`. Two of the code's oddities are options that reproduce the released observations
  (``Calculator(strict=True)``; tests that only define a function and so always pass are run as they are).
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "bank": ["FAILED", "Tool", "ToolBank", "ToolUnavailable", "tool"],
        "calculator": ["Calculator", "evaluate_arithmetic"],
        "code_runner": ["CodeRunner"],
        "collator": ["ThemisCollator"],
        "dates": ["Calendar"],
        "losses": ["PARTS", "ThemisLoss", "ranking_loss"],
        "model": ["ThemisOutput", "ThemisRewardModel"],
        "replaying": ["load_tara", "replay"],
        "search": ["BM25", "BM25Search"],
        "stores": ["Translator", "WeatherCache"],
        "traces": ["SPECIAL_TOKENS", "Example", "Step", "Trace", "TraceFormat", "parse_actions"],
        "trainer": ["ThemisTrainer"],
        "tracing": ["run_trace", "run_traces"],
    },
)
