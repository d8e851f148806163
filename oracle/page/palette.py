"""The colours of page and plots: ramps of even lightness, and pairs that colour-blind people can tell apart."""

from __future__ import annotations

# YlGnBu (ColorBrewer), dark for far off; on dark paper cividis, bright for far off. Both also read as grey.
_LIGHT_RAMP = "#081d58 #253896 #2072b1 #2a9ec1 #4cbac2 #73c8bd #a0dab8 #caeab4 #e3f4b2 #f2fabc #f8faf0".split()
_DARK_RAMP = "#fee838 #dac65b #9b9476 #848179 #757575 #67696f #5b606e #4a536c #3b496c #2a3b5e #1b2533".split()
WHITE_TEXT_LIGHT, BLACK_TEXT_DARK = 2, 4  # levels up to which text is white (black) on the light (dark) ramp

LIGHT: dict[str, str] = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b1f24",
    "muted": "#59626d",
    "line": "#d3d8de",
    "test": "#c04a00",
    "hf": "#0067a8",
    "limit": "#30353c",
}
DARK: dict[str, str] = {
    "paper": "#14171c",
    "panel": "#1e232a",
    "ink": "#e8eaed",
    "muted": "#a3acb8",
    "line": "#3a424d",
    "test": "#ff9b54",
    "hf": "#6fbaf5",
    "limit": "#d0d5db",
}
for _number, (_light, _dark) in enumerate(zip(_LIGHT_RAMP, _DARK_RAMP, strict=True)):
    LIGHT |= {f"v{_number}": _light, f"t{_number}": "#ffffff" if _number <= WHITE_TEXT_LIGHT else "#000000"}
    DARK |= {f"v{_number}": _dark, f"t{_number}": "#000000" if _number <= BLACK_TEXT_DARK else "#ffffff"}


def variables(palette: dict[str, str]) -> str:
    """The palette as CSS variables."""
    return "".join(f"--{name}:{colour};" for name, colour in palette.items())


def themed(svg: str) -> str:
    """A drawing in the light colours made to follow the page's theme."""
    for name in ("ink", "muted", "line", "test", "hf", "limit"):
        svg = svg.replace(LIGHT[name], f"var(--{name})")
    return svg
