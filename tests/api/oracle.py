"""The answers of transformers and PEFT themselves, to compare with those over HTTP."""

from collections.abc import Sequence
from pathlib import Path

import httpx
import peft
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode


def upload(client: httpx.Client, name: str, folder: Path, method: str = "POST") -> httpx.Response:
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    if method == "PUT":
        return client.put(f"/v1/adapters/{name}", files=files)
    return client.post("/v1/adapters", data={"name": name}, files=files)


class Oracle:
    """The tiny model, alone or with adapters put on by PEFT: several are active together."""

    def __init__(self, model_folder: Path, *adapters: Path | None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self._model: torch.nn.Module = LlamaForCausalLM.from_pretrained(model_folder).eval()
        folders = {f"{number}": folder for number, folder in enumerate(adapters) if folder}
        for name, folder in folders.items():
            if isinstance(self._model, peft.PeftModel):
                self._model.load_adapter(folder, name)
            else:
                self._model = peft.PeftModel.from_pretrained(self._model, folder, name)
        if len(folders) > 1:
            self._model.base_model.set_adapter(list(folders))
        self._model.eval()
        self._bytes = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def scores(self, ids: Sequence[int]) -> torch.Tensor:
        """The log-probabilities after each position: `[position, token]`."""
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([list(ids)])).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def loss(self, prompt: str, target: str) -> float:
        """transformers' own: the mean cross-entropy of the target's tokens after the prompt."""
        before, after = self.ids(prompt), self.ids(target)
        labels = torch.tensor([[-100] * len(before) + after])
        with torch.no_grad():
            out = self._model(input_ids=torch.tensor([before + after]), labels=labels)
        return float(out.loss)

    def greedy(self, prompt: str | Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, end tokens included like any other."""
        ids = self.ids(prompt) if isinstance(prompt, str) else list(prompt)
        for _ in range(count):
            ids.append(int(self.scores(ids)[-1].argmax()))
        return ids[-count:]

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def names(self, ids: Sequence[int]) -> list[str]:
        """The tokens as `/v1/completions` names them in its logprobs."""
        return [self._name(token) for token in ids]

    def _name(self, token: int) -> str:
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        byte = self._bytes.get(piece)
        if byte is None:
            return piece
        return chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}"
