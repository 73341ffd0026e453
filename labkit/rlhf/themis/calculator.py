"""Arithmetic without ``eval``, and the tool that checks a worked answer with it."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from labkit.rlhf.themis.bank import Tool

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "abs": abs,
    "ceil": lambda value: float(math.ceil(value)),
    "floor": lambda value: float(math.floor(value)),
    "sqrt": math.sqrt,
}
_LONGEST = 1000  # characters of an expression
_BITS = 4096  # of the largest whole number

_PYTHON_ONLY = re.compile(r"\d_|_\d|\b0[xob]", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*%(?!\s*[\d(.])")
_MARK = re.compile(r"<<([^<>]*)>>\s*(-?[\d.,]*\d\.?|-?\d*)")
_STRICT_MARK = re.compile(r"<<([^<>=]*)(=[^<>]*)?>>\s*(\d+(?:\.\d*)?|\.\d+)?")
# Possessive: a policy may write thousands of spaces, which must not be divided up in every possible way.
_FINAL = re.compile(r"####\s*+(-?\s*+\$?\s*+-?[\d,]*\.?\d+)")
_STRICT_FINAL = re.compile(r"####\s*(\d+(?:\.\d+)?)")


def evaluate_arithmetic(text: str, percent: bool = True) -> int | float:
    """Value of an arithmetic expression; nothing else is evaluated, and nothing takes long.

    Parameters
    ----------
    text : str
        Numbers, ``+ - * / // % **``, parentheses, ``abs``, ``ceil``, ``floor`` and ``sqrt``; with `percent` also
        commas in thousands, ``20%``, ``^``, ``×`` and ``÷``.
    percent : bool
        Read ``20%`` as a fraction where no number follows, and the other signs of everyday arithmetic.

    Returns
    -------
    int or float

    Raises
    ------
    ValueError
        If it is not arithmetic, too long, or its value is too large.

    Examples
    --------
    >>> evaluate_arithmetic("40*4 + 1,000/8")
    285.0
    >>> evaluate_arithmetic("30 * 20%")
    6.0
    >>> evaluate_arithmetic("9**9**9")
    Traceback (most recent call last):
    ...
    ValueError: the value of '9**9**9' is too large
    >>> evaluate_arithmetic("__import__('os')")
    Traceback (most recent call last):
    ...
    ValueError: "__import__('os')" is not arithmetic: Call is not allowed
    """
    shown = text if len(text) <= 60 else text[:57] + "..."
    if len(text) > _LONGEST:
        raise ValueError(f"{shown!r} has {len(text)} characters; at most {_LONGEST} are read")
    source = text.strip()
    # Python reads 1_000 as 1000 and 0x10 as 16; people write neither.
    if _PYTHON_ONLY.search(source):
        raise ValueError(f"{shown!r} is not arithmetic: numbers are decimal, such as 1000 or 1,000")
    if percent:
        source = _THOUSANDS.sub("", source)
        source = _PERCENT.sub(r"(\1/100)", source)
        source = (
            source.replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-").replace("$", "")
        )
    # Whole numbers as people write them may start with zeros, which Python refuses.
    source = re.sub(r"(?<![\d.])0+(?=\d)", "", source)
    try:
        tree = ast.parse(source, mode="eval")
        value = _value(tree.body, shown)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{shown!r} is not arithmetic: it cannot be read") from None
    except ZeroDivisionError:
        raise ValueError(f"{shown!r} divides by zero") from None
    except OverflowError:
        raise ValueError(f"the value of {shown!r} is too large") from None
    if isinstance(value, complex) or not math.isfinite(value):
        raise ValueError(f"{shown!r} has no finite value")
    return value


def _value(node: ast.expr, shown: str) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _small(node.value, shown)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, shown)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, shown), _value(node.right, shown)
        if isinstance(node.op, ast.Pow):
            return _small(_power(left, right, shown), shown)
        if type(node.op) in _BINARY:
            return _small(_BINARY[type(node.op)](left, right), shown)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None and not node.keywords:
            return function(_value(node.args[0], shown))
    what = type(getattr(node, "op", node)).__name__
    raise ValueError(f"{shown!r} is not arithmetic: {what} is not allowed")


def _small(value: Any, shown: str) -> Any:
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise ValueError(f"the value of {shown!r} is too large")
    return value


def _power(base: Any, exponent: Any, shown: str) -> Any:
    # Decided before the power is taken: afterwards it is too late.
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _BITS:
        raise ValueError(f"the value of {shown!r} is too large")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError(f"{shown!r} has no real value")
    return value


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    cleaned = re.sub(r"[\s$,]", "", text).rstrip(".")
    if "_" in cleaned:  # which float() takes
        return None
    try:
        return float(cleaned)
    except ValueError:
        return None


def _same(value: float, shown: str) -> bool:
    """Whether a value is the shown one, to 1e-6 or to the decimals that are shown."""
    number = _number(shown)
    if number is None:
        try:
            number = float(evaluate_arithmetic(shown))
        except ValueError:
            return False
        return math.isclose(value, number, rel_tol=1e-6, abs_tol=1e-9)
    if math.isclose(value, number, rel_tol=1e-6, abs_tol=1e-9):
        return True
    decimals = len(shown.strip().rstrip(".").partition(".")[2])
    # Half a unit of the last shown decimal; a whole number is taken as meant exactly.
    return decimals > 0 and abs(value - number) <= 0.5 * 10.0**-decimals + 1e-9


class Calculator(Tool):
    """Check the marked calculations of a worked answer, ``<<40*4=160>>160``, and its final answer behind ``####``.

    The input is the marks, with anything between them; without a mark it is an expression, and the observation its
    value. The answer itself comes from the state.

    Parameters
    ----------
    strict : bool
        As the released observations were made: numbers must be equal as floats, 1,000 is read as 1 and a negative final
        answer not at all. By default shown numbers may be rounded, and both are read as they are meant.

    Examples
    --------
    >>> calculator = Calculator()
    >>> calculator("<<3*0.1=0.3>>0.3, <<0.3*10=3>>3", {"answer": "... #### 3"})
    'Both the calculation and the answer are correct.'
    >>> Calculator(strict=True)("<<3*0.1=0.3>>0.3", {"answer": "#### 0.3"})[:38]
    'Both the calculation and the answer ar'
    >>> calculator("12 * 12", {})
    '144'
    """

    name = "calculator"
    description = "Checks calculations marked <<40*4=160>>160 and the final answer behind ####; or evaluates arithmetic."
    _CORRECT = "Both the calculation and the answer are correct."
    _DETAILS = "Details: An unexpected error occurred during the calculation."

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def __call__(self, text: str, state: Mapping[str, Any]) -> str:
        answer = state.get("answer")
        if "<<" not in text and "####" not in text and (answer is None or "####" not in answer):
            try:
                return _format(evaluate_arithmetic(text))
            except ValueError as error:
                return f"Error: {error}"
        whole = answer if answer is not None else text
        found = (_STRICT_FINAL if self.strict else _FINAL).search(whole)
        predicted = _number(found.group(1)) if found else None
        if predicted is None:
            return "No valid answer."
        correct, value = self._check(text)
        matches = value is not None and self._matches(value, found.group(1) if found else "", predicted)
        if correct and matches:
            return self._CORRECT
        said = f"does not match the predicted answer {predicted}."
        if correct:
            return f"The calculation process is correct, but the resulting answer {_format(value)} {said}"
        if matches:
            return f"The calculation process is incorrect, but the answer matches the predicted answer. {self._DETAILS}"
        return (
            f"Both the calculation and the answer are incorrect. {self._DETAILS} "
            f"The calculated answer {_format(value)} {said}"
        )

    def _matches(self, value: float, shown: str, predicted: float) -> bool:
        return value == predicted if self.strict else _same(value, re.sub(r"[\s$,]", "", shown))

    def _check(self, text: str) -> tuple[bool, int | float | None]:
        """Whether every marked calculation is right, and the value of the last that could be evaluated."""
        correct, value = False, None
        marks = list((_STRICT_MARK if self.strict else _MARK).finditer(text))
        for number, mark in enumerate(marks):
            correct = correct if number else True
            if self.strict:
                expression, shown = mark.group(1), mark.group(3)
            else:
                expression, _, inner = mark.group(1).rpartition("=")
                expression, shown = expression.partition("=")[0], inner
            try:
                value = evaluate_arithmetic(expression, percent=not self.strict)
            except ValueError:
                correct = False
                continue
            if self.strict:
                correct = correct and shown is not None and value == float(shown)
            else:
                correct = correct and _same(float(value), shown or "")
        return correct, value

    def score(self, observation: str) -> float:
        """1 if the calculation and the answer are right, else 0."""
        return float(observation == self._CORRECT)


def _format(value: int | float | None) -> str:
    return str(value)
