"""whisperkv's settings that are measured: keywords of patch(), those of CrossConfig under "cross"."""

import inspect

SMALL = {"format": "latent_int8", "trim": "padding"}
OURS = {
    "patch(model)": {},
    "latent_int8": {"cross": {"format": "latent_int8"}},
    "latent_int8, trim": {"cross": SMALL},
    "bfloat16": {"weights": "bfloat16"},
    "bfloat16, latent_int8, trim": {"weights": "bfloat16", "cross": SMALL},
    "int8": {"weights": "int8"},
    "int8, latent_int8": {"weights": "int8", "cross": {"format": "latent_int8"}},
    "int8, int8, trim": {"weights": "int8", "cross": {**SMALL, "format": "int8"}},
    "int8, latent_int8, trim": {"weights": "int8", "cross": SMALL},
    "int8, latent_int8, trim, merge": {"weights": "int8", "cross": {**SMALL, "merge": 0.5}},
}


def apply(model, settings):
    """Patch a model with one of OURS."""
    from whisperkv import CrossConfig, patch

    return patch(model, **{**settings, "cross": CrossConfig(**settings.get("cross", {}))})


def unknown(settings):
    """Why this build's patch() does not take the settings, or None."""
    from whisperkv import CrossConfig, patch

    missing = [name for name in settings if name not in inspect.signature(patch).parameters]
    if missing:
        return f"patch() has no {missing[0]}="
    try:
        CrossConfig(**settings.get("cross", {}))
    except (TypeError, ValueError) as error:
        return str(error)
    return None
