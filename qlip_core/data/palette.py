"""The named colours that backgrounds are painted in."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "black": (18, 18, 18),
    "grey": (135, 135, 135),
    "light grey": (203, 203, 203),
    "dark grey": (72, 72, 72),
    "red": (218, 36, 40),
    "dark red": (116, 14, 22),
    "orange": (245, 135, 28),
    "yellow": (250, 216, 42),
    "light yellow": (253, 244, 172),
    "green": (46, 165, 66),
    "light green": (164, 224, 148),
    "dark green": (14, 82, 42),
    "turquoise": (44, 184, 178),
    "blue": (38, 96, 222),
    "light blue": (150, 206, 246),
    "dark blue": (18, 34, 108),
    "purple": (128, 52, 172),
    "light purple": (205, 174, 234),
    "pink": (250, 158, 192),
    "brown": (126, 76, 38),
    "beige": (228, 206, 168),
}
"""Name to sRGB, 0 to 255. Even the nearest two are too far apart for JITTER to confuse."""

BRIGHTNESS_JITTER, CHANNEL_JITTER = 6, 3
"""How far a painted colour's channels may be from the named one's: all together, and each separately."""

JITTER = BRIGHTNESS_JITTER + CHANNEL_JITTER
"""The most that any channel of a painted colour deviates, in levels."""
