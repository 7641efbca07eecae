"""Speech LLMs by name, and what they are asked about a recording."""

import transformers

from ..transcription.audio import RATE
from .families import family_of


def load(name, device="cpu"):
    """(model, processor) of a speech LLM that can be pruned, in the dtype that it was saved in."""
    config = transformers.AutoConfig.from_pretrained(name)
    kind = next((getattr(transformers, each, None) for each in config.architectures or ()), None)
    if kind is None:
        raise ValueError(f"{name}: this transformers has no {', '.join(config.architectures or ['model'])}")
    model = kind.from_pretrained(name, dtype="auto").to(device).eval()
    family_of(model)
    return model, transformers.AutoProcessor.from_pretrained(name)


def inputs_of(processor, samples, question):
    """What generate() is given: one recording and a question, in the words that the model was trained with."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "audio", "audio": samples}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True,
            return_tensors="pt", sampling_rate=RATE,
        )  # fmt: skip
    text = f"{getattr(processor, 'audio_token', '<|audio|>')}{question}"
    return processor(text=text, audio=[samples], sampling_rate=RATE, return_tensors="pt")
