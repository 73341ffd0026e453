"""Tools that look things up in a store: weather of the past, and translations."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.rlhf.themis.bank import Tool, ToolUnavailable

_SKIES = (
    "Sunny",
    "Partly cloudy",
    "Cloudy",
    "Overcast",
    "Mist",
    "Light rain shower",
    "Moderate rain",
    "Heavy snow",
)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON, gzipped or not."""
    path = Path(path)
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def _mapping(store: Any, what: str) -> Mapping[str, Any]:
    """A store that was given, or read from the file that was named."""
    found = read_json(store) if isinstance(store, str | os.PathLike) else store
    if not isinstance(found, Mapping):
        where = f"; {store} holds" if found is not store else ", got"
        kind = type(found).__name__
        raise TypeError(f"store must map {what}, or be the path of a JSON file that does{where} {kind}")
    return found


class WeatherCache(Tool):
    """The weather of a place on a day, from a store of observations; the input is ``City, 2023-06-19``.

    Parameters
    ----------
    store : mapping or path
        Input to observation, or a JSON file of that (gzipped or not).
    fetch : callable, optional
        Asked for what the store lacks, for instance a weather service with a key of your own; what it returns is kept.
        Without it such an input is answered ``None``, as in the release.

    Raises
    ------
    TypeError
        For a store, or a file, that holds something else.

    Examples
    --------
    >>> cache = WeatherCache.synthetic(["Riyadh"], ["2023-05-07"], seed=0)
    >>> cache("Riyadh, 2023-05-07", {}).splitlines()[0]
    'The weather for Riyadh on 2023-05-07 is: '
    >>> cache("Riyadh, 1999-01-01", {})
    'None'
    """

    name = "history_weather"
    description = "The weather of a city on a day of the past. Input: City, YYYY-MM-DD."

    def __init__(
        self, store: Mapping[str, str] | str | Path, fetch: Callable[[str], str] | None = None
    ) -> None:
        found = _mapping(store, "'City, YYYY-MM-DD' to the text of an observation")
        wrong = next((key for key, text in found.items() if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(
                f"store must map 'City, YYYY-MM-DD' to the text of an observation; that of {wrong!r} is a "
                f"{type(found[wrong]).__name__}"
            )
        self.store = dict(found)
        self.fetch = fetch

    def __call__(self, text: str, state: Mapping[str, Any]) -> str:
        key = text.strip()
        if key not in self.store and self.fetch is not None:
            self.store[key] = str(self.fetch(key))
        return self.store.get(key, "None")

    @staticmethod
    def observation(place: str, day: str, values: Mapping[str, Any]) -> str:
        """An observation in the wording of the release.

        `values` holds ``sky``, and as numbers ``temperature`` (°C), ``wind`` (km/h), ``rain`` (mm), ``visibility``
        (km), ``humidity`` (%) and ``uv``.
        """
        return (
            f"The weather for {place} on {day} is: \noverall weather: {values['sky']}; "
            f"temperature: {values['temperature']:.1f}(C); "
            f"wind speed: {values['wind']:.1f}(kph), {values['wind'] / 1.609344:.1f}(mph); "
            f"precipitation: {values['rain']:.1f}(mm), {values['rain'] / 25.4:.2f}(inch); "
            f"visibility: {values['visibility']:.1f}(km), {round(values['visibility'] / 1.609344):.1f}(miles); "
            f"humidity: {values['humidity']:.1f}; UV index: {values['uv']:.1f}."
        )

    @classmethod
    def synthetic(cls, places: Sequence[str], days: Sequence[str], seed: int = 0) -> WeatherCache:
        """A store of invented weather in the release's wording, for every place and day."""
        rng = np.random.default_rng(seed)
        store = {}
        for place in places:
            for day in days:
                values = {
                    "sky": _SKIES[rng.integers(len(_SKIES))],
                    "temperature": round(float(rng.uniform(-10, 38)), 1),
                    "wind": round(float(rng.uniform(2, 40)), 1),
                    "rain": round(float(rng.uniform(0, 12)), 1),
                    "visibility": round(float(rng.uniform(4, 10)), 1),
                    "humidity": float(rng.integers(15, 96)),
                    "uv": float(rng.integers(1, 11)),
                }
                store[f"{place}, {day}"] = cls.observation(place, day, values)
        return cls(store)


class Translator(Tool):
    """A text in English, from a store of translations.

    Parameters
    ----------
    store : mapping or path
        Source text to English, or the release's file (id to ``{"question", "answer"}``).
    translate : callable, optional
        Asked for what the store lacks, for instance a transformers translation model; what it returns is kept.

    Raises
    ------
    TypeError
        For a store, or a file, that holds something else.

    Examples
    --------
    >>> Translator({"Guten Tag": "Good day"})("Guten Tag ", {})
    'Good day'
    """

    name = "translate"
    description = "Translates a text into English."

    def __init__(
        self,
        store: Mapping[str, Any] | str | Path | None = None,
        translate: Callable[[str], str] | None = None,
    ) -> None:
        found = {} if store is None else _mapping(store, "texts to their English")
        pairs = [
            (item["question"], item["answer"]) if isinstance(item, Mapping) else (key, item)
            for key, item in found.items()
        ]
        self.store = {str(source).strip(): str(english) for source, english in pairs}
        self.translate = translate

    @property
    def available(self) -> bool:
        """Whether anything can be translated."""
        return bool(self.store) or self.translate is not None

    def __call__(self, text: str, state: Mapping[str, Any]) -> str:
        key = text.strip()
        if key not in self.store:
            if self.translate is None:
                raise ToolUnavailable(
                    "this text is not in the store of translations; pass translate=, a function such as a "
                    "transformers translation model"
                )
            self.store[key] = str(self.translate(key))
        return self.store[key]
