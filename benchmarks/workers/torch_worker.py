"""transformers, and whisperkv on top of it: the same but for patch(), and log_mel() instead of the extractor."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from worker import Clock, serve


class Engine:
    def imports(self):
        import decoding  # torch and transformers with it

        self.decoding = decoding

    def load(self, folder, dtype="float32", patch=None, threads=1):
        """patch  keywords of whisperkv.patch(), {"cross": keywords of CrossConfig}; None leaves the model alone"""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.processor = transformers.WhisperProcessor.from_pretrained(folder)
        self.model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.encoding, self.hearing = Clock(), Clock()
        encoder = self.model.get_encoder()
        encoder.register_forward_pre_hook(lambda *_: self.encoding.__enter__())
        encoder.register_forward_hook(lambda *_: self.encoding.__exit__())
        if patch is None:
            self.features = lambda audios: (
                self.processor(audios, sampling_rate=16000, return_tensors="pt").input_features
            )
            return {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}
        import whisperkv
        from whisperkv.features import log_mel

        self.features = lambda audios: log_mel(audios, self.processor)
        cross = whisperkv.CrossConfig(**patch["cross"]) if "cross" in patch else None
        whisperkv.patch(self.model, **{**patch, "cross": cross})
        return {"version": f"whisperkv {whisperkv.__version__}, torch {torch.__version__}"}

    def transcribe(self, audios, beams, most, least):
        with self.hearing:
            features = self.features(audios).to(self.model.dtype)
        options = {"num_beams": beams, "max_new_tokens": most, "min_new_tokens": least or None}
        found = self.decoding.generate(self.model, features, **options)
        texts = self.processor.batch_decode(found, skip_special_tokens=True)
        tokens = [self.decoding.transcript_tokens(self.model, row) for row in found]
        return {"texts": texts, "mel": self.hearing.read(), "encoder": self.encoding.read(), "tokens": tokens}

    def likelihood(self, audios, transcripts):
        """Teacher forcing: nats in all, and the number of tokens."""
        start = self.decoding.start_tokens(self.model, self.processor)
        features = self.features(audios).to(self.model.dtype)
        return self.decoding.negative_log_likelihood(self.model, features, [start] * len(audios), transcripts)


if __name__ == "__main__":
    serve(Engine())
