"""Finds and reads a model's files, in a folder or in a repository of the Hugging Face hub."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from nib.checkpoint.paths import explain_adapter, explain_gguf
from nib.errors import UserError, optional

INDEX = 'model.safetensors.index.json'
PICKLES = ('pytorch_model.bin', 'pytorch_model.bin.index.json')


@dataclass(frozen=True)
class Repository:
    """A folder, or a repository of the hub such as HuggingFaceTB/SmolLM2-135M."""

    name: str
    flag: str = '--init_from'  # that names it

    @property
    def is_folder(self) -> bool:
        return Path(self.name).is_dir()

    def find(self, file: str) -> Path | None:
        """Returns the path of a file, downloaded once; None if the repository does not have it.

        Raises UserError if the hub cannot be reached or rejects the request.
        """
        if self.is_folder:
            path = Path(self.name) / file
            return path if path.is_file() else None
        with optional('huggingface_hub', f'{self.flag}={self.name}'):
            import huggingface_hub as hub
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        # It logs every attempt; the message below sums them up.
        logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
        try:
            cached = hub.try_to_load_from_cache(self.name, file)
            if cached is not None:  # a path, or an object that says that there is no such file
                return Path(cached) if isinstance(cached, str) else None
            if file == 'config.json':  # the first one: the download would retry for half a minute
                hub.get_hf_file_metadata(hub.hf_hub_url(self.name, file))
            return Path(hub.hf_hub_download(self.name, file))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                return None
            reason = 'no connection'
        except Exception as error:  # its errors have no common base class
            reason = {
                'GatedRepoError': 'access must be granted on its page; then: hf auth login',
                'RepositoryNotFoundError': 'no such repository, or it is private: hf auth login',
                'ConnectError': 'no connection',
                'HFValidationError': 'an id is OWNER/NAME, of letters, digits, dots, - and _',
            }.get(type(error).__name__, type(error).__name__)
        raise UserError(
            f'there is no folder {self.name}, and {file} of this name could not be downloaded from '
            f'the Hugging Face hub ({reason}); download the repository elsewhere (hf download '
            f'{self.name} --local-dir FOLDER) and name its folder: {self.flag}=FOLDER'
        )

    def read_json(self, file: str) -> dict:
        """Returns the object in a JSON file, or an empty one if the repository does not have it.

        Raises UserError if the file is not valid.
        """
        path = self.find(file)
        if path is None:
            return {}
        try:
            found = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror})') from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{path} is not JSON ({type(error).__name__}: {error}); download it again'
            ) from error
        if not isinstance(found, dict):
            raise UserError(f'{path} does not contain a JSON object; download it again')
        return found

    def read_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of model.safetensors, or of the shards that its index names.

        Raises UserError if a file is missing or damaged, or if the weights are in another format.
        """
        if path := self.find('model.safetensors'):
            return _read_file(path)
        if not self.find(INDEX):
            self.reject_other_formats()
            raise UserError(
                f'{self.name} has neither model.safetensors nor {INDEX}; download it again'
            )
        shards = self.read_json(INDEX).get('weight_map')
        if not isinstance(shards, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in shards.values()
        ):
            raise UserError(f'{INDEX} of {self.name} has no valid weight_map; download it again')
        tensors = {}
        for file in sorted(set(shards.values())):
            path = self.find(file)
            if path is None:
                raise UserError(f'{self.name} has no {file}, which {INDEX} names; download it')
            tensors.update(_read_file(path))
        for name, file in shards.items():
            if name not in tensors:
                raise UserError(
                    f'{file} of {self.name} does not contain {name}, which {INDEX} places there; '
                    f'download both again'
                )
        return tensors

    def reject_other_formats(self):
        """Raises UserError if all weights are in formats that nibGPT cannot read."""
        for names in self._listings():
            if {'model.safetensors', INDEX} & names:
                return
            if 'adapter_config.json' in names:
                raise UserError(explain_adapter(self.name))
            for name in sorted(names):
                if name.endswith('.gguf'):
                    raise UserError(explain_gguf(Path(self.name, name)))
            for file in PICKLES:
                if file in names:
                    raise UserError(
                        f'{self.name} has its weights only in {file}, a pickle, which can run code '
                        f'when it is read: use a version of the model with model.safetensors, or '
                        f'write one with transformers: AutoModelForCausalLM.from_pretrained('
                        f"'{self.name}').save_pretrained('FOLDER')"
                    )

    def _listings(self) -> Iterator[set[str]]:
        """Yields the file names: a folder's, or the cache's and then the hub's."""
        if self.is_folder:
            yield {path.name for path in Path(self.name).iterdir()}
            return
        import huggingface_hub as hub

        with suppress(Exception):  # its errors have no common base class
            cached = Path(hub.snapshot_download(self.name, local_files_only=True))
            yield {path.name for path in cached.iterdir()}
        with suppress(Exception):
            # Unlike list_repo_files, this does not retry for half a minute.
            found = hub.HfApi().model_info(self.name, timeout=10)
            yield {file.rfilename for file in found.siblings or []}


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open('rb'):  # safetensors does not say why it cannot open a file
            pass
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    try:
        return load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f'{path} is damaged or incomplete ({type(error).__name__}: {error}); download it again'
        ) from error
