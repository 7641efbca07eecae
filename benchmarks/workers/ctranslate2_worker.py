"""faster-whisper, one audio after the other or by its BatchedInferencePipeline."""

from worker import Clock, serve

RATE = 16000
SAME = {  # no timestamps, no fallback, nothing skipped
    "without_timestamps": True,
    "temperature": 0,
    "condition_on_previous_text": False,
    "vad_filter": False,
    "no_speech_threshold": None,
    "log_prob_threshold": None,
    "compression_ratio_threshold": None,
}


class Engine:
    def imports(self):
        import faster_whisper

        self.library = faster_whisper

    def load(self, folder, compute_type, batched=False, threads=1):
        import ctranslate2

        self.model = self.library.WhisperModel(
            folder, device="cpu", compute_type=compute_type, cpu_threads=threads, num_workers=1, local_files_only=True
        )
        self.hearing, self.encoding = Clock(), Clock()
        extractor = self.model.feature_extractor
        kind = type(extractor)  # a call looks the function up there
        extractor.__class__ = type(kind.__name__, (kind,), {"__call__": self.hearing.around(kind.__call__)})
        self.model.encode = self.encoding.around(self.model.encode)
        self.batched = self.library.BatchedInferencePipeline(self.model) if batched else None
        self.language = "en"
        return {"version": f"faster-whisper {self.library.__version__}, ctranslate2 {ctranslate2.__version__}"}

    def transcribe(self, audios, beams, most, least):
        options = {**SAME, "language": self.language, "beam_size": beams, "max_new_tokens": most}
        segments = self._batch(audios, options) if self.batched else self._one_by_one(audios, options)
        return {
            "texts": ["".join(part.text for part in parts) for parts in segments],
            "tokens": [[token for part in parts for token in part.tokens] for parts in segments],
            "mel": self.hearing.read(),
            "encoder": self.encoding.read(),
        }

    def _one_by_one(self, audios, options):
        return [list(self.model.transcribe(audio, **options)[0]) for audio in audios]

    def _batch(self, audios, options):
        """The pipeline takes one recording and the places of its chunks."""
        import numpy

        places, start = [], 0
        for audio in audios:
            places.append({"start": start / RATE, "end": (start + len(audio)) / RATE})
            start += len(audio)
        found, _ = self.batched.transcribe(
            numpy.concatenate(audios), **options, clip_timestamps=places, batch_size=len(audios)
        )
        parts = [[] for _ in audios]
        for segment in found:
            middle = (segment.start + segment.end) / 2
            parts[next(row for row, place in enumerate(places) if middle <= place["end"])].append(segment)
        return parts


if __name__ == "__main__":
    serve(Engine())
