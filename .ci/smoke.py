"""Tries an installed whisperkv: a clip through tiny.en, plain, lossless and with the smallest caches."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import whisperkv  # noqa: E402

place = Path(whisperkv.__file__).parent
assert place.parent.name == "site-packages", f"this is {place}, and not an installed one"
assert (place / "py.typed").exists() and (place / "data" / "speech.flac").exists()
assert all(hasattr(whisperkv, name) for name in whisperkv.__all__)

model, processor = whisperkv.demo_model()
samples, text = whisperkv.demo_audio()
features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features
plain = model.generate(features, num_beams=2)
lossless = whisperkv.patch(model).generate(features, num_beams=2)
assert plain.tolist() == lossless.tolist(), "patch(model) is not lossless here"
small = whisperkv.CrossConfig("latent_int4", trim="padding")
whisperkv.patch(model, whisperkv.EvictionConfig(recent=32, heavy=16), small, weights="int8")
words = processor.decode(model.generate(features)[0], skip_special_tokens=True).split()
assert len(words) > 0.8 * len(text.split()), words
held = whisperkv.stats(model)
assert held.cross_bytes * 50 < held.cross_bytes_transformers and held.evicted
print(f"whisperkv {whisperkv.__version__}: {', '.join(sorted(file.name for file in place.glob('*.so')))} in {place}")
print(held)
