"""Facts that are true and free: which parameter comes first in a function of Python's standard library.

``json.dumps`` takes ``obj`` first. Every (module, function, parameter) is a subject, a relation and an object, read
off the running interpreter with `inspect.signature`, without a download and without a licence to ask about. Which
facts there are depends a little on Python's version.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch

MODULES = (
    "argparse ast base64 bisect calendar cmath codecs colorsys configparser contextlib copy csv datetime dis email "
    "fnmatch fractions functools glob gzip hashlib heapq hmac html http.client imaplib importlib.util inspect io "
    "ipaddress json locale logging lzma mailbox math mimetypes operator os os.path pathlib pickle pickletools pkgutil "
    "platform plistlib pprint py_compile random re secrets shelve shlex shutil socket sqlite3 ssl statistics string "
    "subprocess sysconfig tarfile tempfile textwrap timeit token tokenize trace traceback types typing unicodedata "
    "unittest.mock urllib.parse urllib.request uuid warnings wave weakref xml.dom.minidom xml.etree.ElementTree "
    "xml.sax.saxutils zipapp zipfile zlib"
)


class Signature(NamedTuple):
    """A function of the standard library and its first parameter."""

    module: str
    function: str
    parameter: str


@cache
def signature_facts() -> tuple[Signature, ...]:
    """All public functions of some ninety modules that say what their first parameter is called.

    Returns
    -------
    tuple of Signature
        Sorted; functions that a module only imports belong to the module that wrote them.

    Examples
    --------
    >>> Signature("json", "dumps", "obj") in signature_facts()
    True
    >>> len(signature_facts()) > 500
    True
    """
    found = set()
    for name in MODULES.split():
        module = importlib.import_module(name)
        for function, value in list(vars(module).items()):
            if function.startswith("_") or not (inspect.isfunction(value) or inspect.isbuiltin(value)):
                continue
            home = (getattr(value, "__module__", None) or name).lstrip("_")
            if home.split(".")[0] != name.split(".")[0]:
                continue
            try:
                parameters = list(inspect.signature(value).parameters.values())
            except (TypeError, ValueError):
                continue
            first = parameters[0] if parameters else None
            if first is not None and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
                found.add(Signature(name, function, first.name))
    return tuple(sorted(found))


def signature_edits(count: int = 20, seed: int = 0, *, neighbours: int = 10) -> list[dict[str, Any]]:
    """Draw wrong first parameters for some functions, with paraphrases and neighbours, as texts.

    Parameters
    ----------
    count : int
        Edits, each of another function.
    seed : int
        Of the draw.
    neighbours : int
        Most neighbours an edit: other functions whose first parameter has the same name.

    Returns
    -------
    list of dict
        With ``prompt``, ``new``, ``true``, ``subject``, ``paraphrases`` and ``neighbours``, the arguments of
        ``labkit.finetuning.EditRequest``.

    Raises
    ------
    ValueError
        If there are not so many facts with a neighbour.

    Examples
    --------
    >>> edit = signature_edits(1, seed=0)[0]
    >>> edit["prompt"].endswith("is called"), edit["new"] != edit["true"]
    (True, True)
    """
    facts = signature_facts()
    common = Counter(fact.parameter for fact in facts)
    usable = [i for i, fact in enumerate(facts) if common[fact.parameter] > 2]
    if not 1 <= count <= len(usable):
        raise ValueError(f"count must lie in 1..{len(usable)}, got {count!r}")
    names = sorted(name for name, number in common.items() if number > 2)
    generator = torch.Generator().manual_seed(9_000_000 + seed)
    drawn = [usable[i] for i in torch.randperm(len(usable), generator=generator)[:count].tolist()]
    edits = []
    for i in drawn:
        fact = facts[i]
        others = [name for name in names if name != fact.parameter]
        new = others[int(torch.randint(len(others), (), generator=generator))]
        same = [j for j, other in enumerate(facts) if other.parameter == fact.parameter and j not in drawn]
        order = torch.randperm(len(same), generator=generator)[:neighbours].tolist()
        edits.append(
            {
                "prompt": _asked(fact),
                "new": new,
                "true": fact.parameter,
                "subject": f"{fact.module}.{fact.function}",
                "paraphrases": [f"help({fact.module}.{fact.function}): its first argument has the name"],
                "neighbours": [_asked(facts[same[j]]) for j in order],
            }
        )
    return edits


def _asked(fact: Signature) -> str:
    return f"In Python, the first parameter of {fact.module}.{fact.function} is called"
