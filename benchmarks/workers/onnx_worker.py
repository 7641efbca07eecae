"""ONNX Runtime under optimum: the generate() of transformers on what optimum exported, matrices as int8 codes."""

from worker import Clock, serve


class Engine:
    def imports(self):
        import torch
        import transformers
        from optimum.onnxruntime import ORTModelForSpeechSeq2Seq

        self.torch, self.transformers, self.kind = torch, transformers, ORTModelForSpeechSeq2Seq

    def load(self, folder, multilingual, threads=1):
        import onnxruntime

        self.torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.processor = self.transformers.WhisperProcessor.from_pretrained(folder)
        self.model = self.kind.from_pretrained(folder, session_options=options, provider="CPUExecutionProvider")
        self.hearing, self.encoding = Clock(), Clock()
        self.model.encoder.forward = self.encoding.around(self.model.encoder.forward)
        self.language = {"language": "en", "task": "transcribe"} if multilingual else {}
        return {"version": f"onnxruntime {onnxruntime.__version__}, transformers {self.transformers.__version__}"}

    def transcribe(self, audios, beams, most, least):
        with self.hearing:
            features = self.processor(audios, sampling_rate=16000, return_tensors="pt").input_features
        options = {"num_beams": beams, "max_new_tokens": most, "min_new_tokens": least or None}
        found = self.model.generate(features, **self.language, **options)
        texts = self.processor.batch_decode(found, skip_special_tokens=True)
        return {"texts": texts, "tokens": None, "mel": self.hearing.read(), "encoder": self.encoding.read()}


if __name__ == "__main__":
    serve(Engine())
