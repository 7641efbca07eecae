"""whisper.cpp through pywhispercpp, built on this machine for its instruction set. It takes one audio after the other,
and the times of its parts are those that it keeps itself."""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import tempfile
from pathlib import Path

from worker import serve

LIBRARIES = ("libggml-base.so.0", "libggml-cpu.so.0", "libggml.so.0", "libwhisper.so.1")
TIMES = re.compile(r"(mel|encode) time = +([\d.]+) ms")
SAME = {  # no timestamps, no fallback, nothing skipped
    "language": "en",
    "no_timestamps": True,
    "single_segment": True,
    "no_context": True,
    "suppress_nst": True,
    "temperature": 0.0,
    "temperature_inc": 0.0,
    "logprob_thold": -1e9,
    "entropy_thold": -1e9,
    "no_speech_thold": 1.1,
    "print_progress": False,
    "greedy": {"best_of": 1},
}


class Engine:
    def imports(self):
        place = Path(importlib.util.find_spec("_pywhispercpp").origin).parent
        for name in LIBRARIES:  # what was built from source does not find them itself
            if (place / name).is_file():
                ctypes.CDLL(str(place / name), ctypes.RTLD_GLOBAL)
        import pywhispercpp.model

        self.library = pywhispercpp.model

    def load(self, file, threads=1):
        self.file, self.threads, self.beams = file, threads, None
        self._ready(1)
        return {"version": f"pywhispercpp {importlib.metadata.version('pywhispercpp')}"}

    def _ready(self, beams):
        """Greedy or not is decided when a model is loaded."""
        if beams != self.beams:
            self.model, self.beams = None, beams
            self.model = self.library.Model(
                self.file,
                params_sampling_strategy=int(beams > 1),
                redirect_whispercpp_logs_to=None,
                n_threads=self.threads,
                beam_search={"beam_size": beams, "patience": -1.0},
                **SAME,
            )

    def transcribe(self, audios, beams, most, least):
        self._ready(beams)
        self.library.pw.whisper_reset_timings(self.model._ctx)
        found = [self.model.transcribe(audio, max_tokens=most) for audio in audios]
        times = self._times()
        texts = ["".join(segment.text for segment in segments) for segments in found]
        return {"texts": texts, "tokens": None, "mel": times["mel"], "encoder": times["encode"]}

    def _times(self):
        """Seconds of each part, which it prints."""
        with tempfile.TemporaryFile() as file:
            stderr = os.dup(2)
            os.dup2(file.fileno(), 2)
            try:
                self.library.pw.whisper_print_timings(self.model._ctx)
            finally:
                os.dup2(stderr, 2)
                os.close(stderr)
            file.seek(0)
            return {part: float(ms) / 1000 for part, ms in TIMES.findall(file.read().decode(errors="replace"))}


if __name__ == "__main__":
    serve(Engine())
