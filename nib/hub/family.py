"""What a family of open models calls the parts of model.py, for reading and for writing.

A Family is a table: keys of config.json and names of tensors, beside those of model.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model import GPT, GPTConfig
from nib.errors import UserError
from nib.machine.device import ShapesOnly
from nib.machine.memory import total_memory

# Keys of config.json that change neither the logits nor the meaning of the tokens: how the model
# was trained, is generated from by default, or is used for other purposes.
HARMLESS = re.compile(
    r"""_.*|.*_token_id|summary_.*|output_.*|forced_.*|.*suppress_tokens|unsloth_.*|.*_pdrop
    |architectures|model_type|transformers_version|transformers\.js_config|name_or_path
    |dtype|torch_dtype|use_bfloat16|torchscript|tf_legacy_loss|use_cache|initializer_range
    |attention_dropout|gradient_checkpointing|pretraining_tp|reorder_and_upcast_attn|n_ctx
    |id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|tokenizer_class
    |prefix|return_dict|return_dict_in_generate|chunk_size_feed_forward|is_decoder|is_llama_config
    |max_length|min_length|do_sample|temperature|top_k|top_p|typical_p|num_return_sequences
    |repetition_penalty|length_penalty|diversity_penalty|num_beams|num_beam_groups|early_stopping
    |no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|remove_invalid_values
    |exponential_decay_length_penalty""",
    re.VERBOSE,
)
REQUIRED = object()  # a key without a default
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (
    'quantized weights are not supported; use a version of the model in bfloat16, float16 or '
    'float32'
)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, as a table."""

    model_type: str
    architecture: str
    # Key of config.json -> field of GPTConfig, and its value if the key is absent or null.
    keys: Mapping[str, tuple[str, Any]]
    # Key -> the values that mean what model.py computes; others are rejected.
    fixed: Mapping[str, tuple]
    # Field of GPTConfig -> the values that the architecture supports.
    needs: Mapping[str, tuple]
    prefix: str  # of their names, except the output head's
    outer: Mapping[str, str]  # our name -> theirs
    block: str  # name of block {i}, theirs
    # Our name in a block -> theirs. Several of theirs are one of ours, stacked by rows.
    inner: Mapping[str, tuple[str, ...]]
    transposed: tuple[str, ...] = ()  # layers whose matrices are (inputs, outputs) there
    ignored: re.Pattern = re.compile('(?!)')  # tensors that are not weights

    def read_fields(self, config: Mapping, special: Mapping) -> GPTConfig:
        """Returns the GPTConfig of a config.json.

        special: the fields that the table of keys does not have.
        Raises UserError, which names the key, for a value that model.py does not support.
        """
        values = dict(special)
        for key, (name, default) in self.keys.items():
            value = config.get(key)
            if value is None:
                value = default
            if value is REQUIRED:
                raise UserError(f'config.json has no key {key}')
            wanted = type(getattr(GPTConfig, name))
            if type(value) is int and wanted is float:
                value = float(value)
            if type(value) is not wanted:
                raise UserError(f'config.json: {key} is {value!r:.80}, expected {wanted.__name__}')
            if config.get(key) == 0 and wanted is not bool:  # here, 0 would be the default
                raise UserError(f'config.json: {key} is {value}: it must be above 0')
            values[name] = value
        try:
            model = GPTConfig(**values)
        except ValueError as error:
            reason = str(error)
            for key, (name, _) in self.keys.items():
                reason = re.sub(rf'\b{name}\b', key, reason)
            raise UserError(f'config.json: {reason}') from error
        tables = 16 * model.block_size * model.head_width  # bytes, while Rotary computes them
        if model.position == 'rotary' and tables > total_memory():
            raise UserError(
                f'config.json: max_position_embeddings is {model.block_size:,}, whose rotary '
                f'angles take {tables / 1e9:,.1f} GB: lower it in a local copy'
            )
        return model

    def check_keys(self, config: Mapping, special: Mapping[str, tuple[type, ...]]):
        """Raises UserError, which names the key, unless every key is honored or changes nothing.

        special: keys that the family reads itself, and the types of their values.
        """
        for key, value in config.items():
            if key == 'quantization_config' and value is not None:
                raise UserError(f'config.json has a {key}: {QUANTIZED}')
            if key in self.fixed:
                if value not in self.fixed[key]:
                    allowed = ' or '.join(map(repr, self.fixed[key]))
                    raise UserError(
                        f'config.json: {key} is {value!r}, but only {allowed} is supported'
                    )
            elif key in special:
                if value is not None and type(value) not in special[key]:
                    wanted = ' or '.join(kind.__name__ for kind in special[key])
                    raise UserError(f'config.json: {key} is {value!r:.80}, expected {wanted}')
            elif key in self.keys or HARMLESS.fullmatch(key):
                continue
            elif value not in (None, False, '') and value != [] and value != {}:
                raise UserError(
                    f'config.json: the key {key} ({value!r:.80}) is not known and may change '
                    f'the model; if it does not, delete it from config.json in a local copy'
                )
        named = config.get('architectures') or [self.architecture]
        base = self.architecture.replace('ForCausalLM', 'Model').replace('LMHeadModel', 'Model')
        if named not in ([self.architecture], [base]):
            raise UserError(
                f'config.json: architectures is {named!r}, but only [{self.architecture!r}] is '
                f'supported'
            )

    def why_not(self, config: GPTConfig) -> str | None:
        """Returns which keys of GPTConfig this architecture does not support, or None."""
        reasons = [
            f'{name} is {value}, but {self.architecture} only supports '
            + ' or '.join(map(str, allowed))
            for name, allowed in self.needs.items()
            if (value := getattr(config, name)) not in allowed
        ]
        return '; '.join(reasons) or None

    def write_fields(self, config: GPTConfig) -> dict:
        """Returns the keys of config.json that the tables know."""
        settled = {
            'n_kv_head': config.kv_heads,
            'head_dim': config.head_width,
            'mlp_width': config.mlp_units,
            'norm_eps': config.norm_eps or (1e-5 if config.norm == 'layer' else 1e-6),
        }
        fields = {key: settled.get(n, getattr(config, n)) for key, (n, _) in self.keys.items()}
        fixed = {key: allowed[0] for key, allowed in self.fixed.items() if allowed[0] is not None}
        return {
            'architectures': [self.architecture],
            'model_type': self.model_type,
            **fields,
            **fixed,
        }

    def pairs(self, config: GPTConfig, biases: frozenset[str]) -> Iterator['Pair']:
        """Yields all tensors of the model, in the order of model.py.

        biases: layers, by our names in a block, that have a bias in the file.
        """
        with ShapesOnly():
            ours = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
        entries: list[tuple[str, tuple[str, ...]]]
        entries = [(name, (theirs,)) for name, theirs in self.outer.items()]
        for i in range(config.n_layer):
            block = self.block.format(i)
            entries += [
                (f'transformer.h.{i}.{inner}', tuple(block + name for name in theirs))
                for inner, theirs in self.inner.items()
            ]
        heads = config.n_head, config.kv_heads, config.kv_heads
        for name, theirs in entries:
            layer, _, kind = name.rpartition('.')
            inner = re.sub(r'transformer\.(h\.\d+\.)?', '', layer)
            in_theirs = kind != 'bias' or inner in biases
            if f'{layer}.weight' not in ours or not (name in ours or in_theirs):
                continue
            shape = ours.get(name, ours[f'{layer}.weight'][:1])
            rows = [shape[0] // len(theirs)] * len(theirs)
            if len(theirs) == 3:  # queries, keys and values
                rows = [n * config.head_width for n in heads]
            is_transposed = kind == 'weight' and inner in self.transposed
            yield Pair(name, theirs, rows, shape, name in ours, in_theirs, is_transposed)

    def to_ours(
        self, tensors: dict[str, torch.Tensor], config: GPTConfig, biases: frozenset[str]
    ) -> dict[str, torch.Tensor]:
        """Returns the state_dict of model.py; takes what it uses out of `tensors`.

        Raises UserError if a tensor is missing, has another shape, or is not used.
        """
        if not any(name.startswith(self.prefix) for name in tensors):  # saved without the head
            for name in [name for name in tensors if name != 'lm_head.weight']:
                tensors[self.prefix + name] = tensors.pop(name)
        renamed = {}
        for pair in self.pairs(config, biases):
            if pair.in_ours and pair.in_theirs:
                renamed[pair.ours] = pair.join([tensors.pop(n, None) for n in pair.theirs])
            elif pair.in_ours:
                renamed[pair.ours] = torch.zeros(pair.shape)
        if 'lm_head.weight' in tensors:  # a copy of the embedding
            head = tensors.pop('lm_head.weight')
            check_numbers('lm_head.weight', head)
            if not torch.equal(head, renamed['transformer.wte.weight']):
                raise UserError(
                    'the tensor lm_head.weight differs from the embedding, although '
                    'tie_word_embeddings is true in config.json'
                )
        for name in tensors:
            if not self.ignored.search(name):
                raise UserError(
                    f'the tensor {name} is not part of {self.architecture}, or a changed model.py '
                    f'does not have it'
                )
        return renamed

    def to_theirs(
        self, tensors: Mapping[str, torch.Tensor], config: GPTConfig, biases: frozenset[str]
    ) -> dict[str, torch.Tensor]:
        """Returns the tensors of the file for a state_dict of model.py."""
        renamed = {}
        for pair in self.pairs(config, biases):
            if pair.in_ours:
                renamed.update(pair.split(tensors[pair.ours]))
            else:  # a bias that our model does not have
                parts = torch.zeros(pair.shape).split(pair.rows)
                renamed.update(zip(pair.theirs, parts, strict=True))
        return {name: tensor.contiguous() for name, tensor in renamed.items()}


def check_numbers(name: str, tensor: torch.Tensor):
    """Raises UserError if a tensor is quantized, or contains NaN or infinity."""
    if tensor.dtype not in FLOATS:
        raise UserError(f'the tensor {name} has dtype {tensor.dtype}: {QUANTIZED}')
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(f'the tensor {name} contains NaN or infinite numbers; download it again')


@dataclass(frozen=True)
class Pair:
    """A tensor of model.py and its counterparts, which it stacks by rows."""

    ours: str
    theirs: tuple[str, ...]
    rows: list[int]  # of each counterpart
    shape: torch.Size  # of ours
    in_ours: bool  # False: a bias that only the file has
    in_theirs: bool  # False: a bias that only model.py has
    transposed: bool  # a matrix of theirs is (inputs, outputs)

    def join(self, parts: list[torch.Tensor | None]) -> torch.Tensor:
        """Returns our tensor.

        Raises UserError if a part is missing, has another shape or dtype, or is not finite.
        """
        joined = []
        for name, part, rows in zip(self.theirs, parts, self.rows, strict=True):
            shape = (rows, *self.shape[1:])
            expected = shape[::-1] if self.transposed else shape
            if part is None:
                raise UserError(f'the tensor {name} is missing')
            if tuple(part.shape) != expected:
                raise UserError(
                    f'the tensor {name} has shape {tuple(part.shape)}, but '
                    f'according to config.json, it should have {expected}'
                )
            check_numbers(name, part)
            joined.append(part.t() if self.transposed else part)
        return joined[0].contiguous() if len(joined) == 1 else torch.cat(joined)

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the counterparts of our tensor, by name."""
        parts = [part.t() if self.transposed else part for part in tensor.split(self.rows)]
        return dict(zip(self.theirs, parts, strict=True))
