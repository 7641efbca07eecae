"""OpenVINO: openvino-genai's WhisperPipeline on what optimum-intel exported. It takes one audio after the other, and
the times of its parts are those that it keeps itself."""

import importlib.metadata

from worker import serve


class Engine:
    def imports(self):
        import openvino_genai

        self.library = openvino_genai

    def load(self, folder, multilingual, threads=1):
        self.pipeline = self.library.WhisperPipeline(
            folder, "CPU", INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1, PERFORMANCE_HINT="LATENCY"
        )
        self.language = {"language": "<|en|>", "task": "transcribe"} if multilingual else {}
        return {"version": f"openvino-genai {importlib.metadata.version('openvino-genai')}"}

    def transcribe(self, audios, beams, most, least):
        options = {**self.language, "max_new_tokens": most, "num_beams": beams, "return_timestamps": False}
        if least:
            options["min_new_tokens"] = least
        found = [self.pipeline.generate(audio.tolist(), **options) for audio in audios]
        mel = sum(each.perf_metrics.get_features_extraction_duration().mean for each in found) / 1e3
        raw = (each.perf_metrics.whisper_raw_metrics for each in found)
        encoder = sum(sum(each.encode_inference_durations) for each in raw) / 1e6
        return {"texts": [each.texts[0] for each in found], "tokens": None, "mel": mel, "encoder": encoder}


if __name__ == "__main__":
    serve(Engine())
