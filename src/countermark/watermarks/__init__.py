"""Watermarks: the sets of every scheme, the commitment that binds them, and the owner's key."""

from countermark.watermarks.commitment import draw_coins, second_commitment, secret_seed, sign
from countermark.watermarks.key import Key, load_key, load_secret, new_secrets, write_key
from countermark.watermarks.sets import (
    CRAFTING_STEPS,
    LABELS,
    SCHEMES,
    WatermarkSet,
    coin_set,
    craft_adversarial,
    full_strength,
    published_sample,
    published_set,
)

__all__ = [
    "CRAFTING_STEPS",
    "LABELS",
    "SCHEMES",
    "Key",
    "WatermarkSet",
    "coin_set",
    "craft_adversarial",
    "draw_coins",
    "full_strength",
    "load_key",
    "load_secret",
    "new_secrets",
    "published_sample",
    "published_set",
    "second_commitment",
    "secret_seed",
    "sign",
    "write_key",
]
