"""A conversation with an instruction-tuned model, turn by turn, in a terminal or a pipe."""

import io
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from model import GPT
from nib.api import Continuation
from nib.checkpoint.weights import Weights
from nib.errors import UserError, warn
from nib.hub.chat_template import ChatTemplate, read_chat_template
from nib.hub.files import Repository
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.vocabulary import without_surrogates

SIGN = '> '  # the prompt sign
Message = dict[str, str]  # 'role' and 'content'


@dataclass(frozen=True)
class ChatFormat:
    """How a model reads a conversation."""

    template: ChatTemplate
    tokenizer: HfTokenizer
    ends: frozenset[int]  # tokens that end a turn
    special: frozenset[int]  # and other special tokens: not part of an answer's text
    control: frozenset[int]  # and those to which the template gives a meaning, such as <think>

    @classmethod
    def of(cls, weights: Weights) -> 'ChatFormat':
        """Returns the format of a model. Raises UserError if it has no chat template."""
        tokenizer = weights.known_tokenizer()
        if not isinstance(tokenizer, HfTokenizer) or not (
            template := read_chat_template(Repository(weights.name))
        ):
            raise UserError(
                f'{weights.name} has no chat template: --chat needs an instruction-tuned model, '
                f'such as Qwen/Qwen3-0.6B (docs/sampling.md says how to use a run that was '
                f'fine-tuned from one)'
            )
        tokenizer = replace(tokenizer, spells_end_of_text=False)  # the template writes these tokens
        ends = {id for id in template.end_ids if 0 <= id < tokenizer.vocab_size}
        ends |= {tokenizer.end_of_text} - {None}
        special, control = set(ends), set()
        written = _written_by(template)
        for id, token in tokenizer.added_tokens().items():
            if token.special:
                special.add(id)
            elif token.content in written and not token.content.isspace():
                control.add(id)
        return cls(template, tokenizer, *map(frozenset, (ends, special, special | control)))

    def encode(self, messages: list[Message]) -> list[int]:
        """Returns the token ids of a conversation, up to where the model's answer begins.

        They are those of transformers, except that the words of a message contain no control
        tokens: what looks like one is encoded as its characters. An answer may contain <think>.
        Raises UserError if the template rejects the conversation, or makes special tokens of words.
        """
        ids = self._encode(messages)
        # A template may change words or join messages, so that new tokens appear.
        plain = [
            message
            if message['role'] == 'assistant' or not message['content'].strip()
            else {**message, 'content': 'a'}
            for message in messages
        ]
        if self._special_ids(ids) != self._special_ids(self._encode(plain)):
            raise UserError('the chat template would turn words of a message into special tokens')
        return ids

    def _special_ids(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self.special]

    def _encode(self, messages: list[Message]) -> list[int]:
        forged: dict[str, str] = {}  # mark -> the words for which it stands
        # Digits, because templates copy them; a text does not contain those of this call.
        secret = f'{secrets.randbits(128)}'
        marked = []
        for message in messages:
            control = self.special if message['role'] == 'assistant' else self.control
            content, at = without_surrogates(message['content']), 0
            parts = []
            for start, end in self.tokenizer.find(content, control):
                mark = f'{secret}.{len(forged)}.'
                forged[mark] = content[start:end]
                parts.append(content[at:start] + mark)
                at = end
            marked.append({**message, 'content': ''.join(parts) + content[at:]})
        parts = re.split(rf'({secret}\.[0-9]+\.)', self.template.render(marked))
        parts[1::2] = [forged.get(mark, '') for mark in parts[1::2]]
        return self.tokenizer.encode_parts(parts, self.control)


def _written_by(template: ChatTemplate) -> str:
    """Returns the source of a template, and what it writes, such as '<|' + message.role."""
    turns = [{'role': role, 'content': 'a'} for role in ('user', 'assistant', 'user')]
    written = [template.source]
    for messages in (turns, [{'role': 'system', 'content': 'a'}, *turns]):
        with suppress(UserError):  # a conversation that it rejects
            written.append(template.render(messages))
    return '\n'.join(written)


@dataclass
class Conversation:
    """The messages so far, and how answers are generated.

    show: prints a piece of an answer.
    """

    form: ChatFormat
    messages: list[Message]  # a system message may come first
    block_size: int
    max_new_tokens: int
    show: Callable[[str], None]

    @classmethod
    def begin(
        cls, weights: Weights, system: str | None, max_new_tokens: int, show: Callable[[str], None]
    ) -> 'Conversation':
        """Returns a conversation with a model. system: its system message, if it has one.

        Raises UserError if the model has no chat template.
        """
        messages = [] if system is None else [{'role': 'system', 'content': system}]
        form = ChatFormat.of(weights)
        return cls(form, messages, weights.model.block_size, max_new_tokens, show)

    def opening_ids(self) -> list[int]:
        """Returns the token ids of the shortest possible conversation.

        Raises UserError if the template rejects it, or the system message is too long.
        """
        ids = self.form.encode([*self.messages, {'role': 'user', 'content': 'a'}])
        if len(ids) > self.room:
            raise UserError(
                f'--start: with this system message, a conversation begins with {len(ids):,} '
                f'tokens, but only {self.room:,} are available, because the rest of the context '
                f'of {self.block_size:,} is reserved for the answer: shorten the message'
            )
        return ids

    @property
    def room(self) -> int:
        """The number of tokens for the conversation, beside those for an answer."""
        return self.block_size - min(self.max_new_tokens, self.block_size // 2)

    def run(self, model: GPT, stop: str, seed: int, **sampling):
        """Reads lines and answers each, until the input ends or Ctrl-C at the prompt.

        sampling: arguments of GPT.generate().
        """
        for turn, line in enumerate(read_lines()):
            try:
                asked = self.add(line)
            except UserError as error:
                note(f'this message was left out: {error}')
                continue
            answer = Continuation(stop)
            # A seed of its own for each turn: the same noise would favor the same words.
            sampling['seed'] = (seed + turn) % (1 << 63)
            cut = ''
            with suppress(KeyboardInterrupt):  # which ends this answer only
                cut = self.reply(model, asked, answer, **sampling)
            self.show('\n')
            if cut:
                note(cut)
            self.messages.append({'role': 'assistant', 'content': answer.text})

    def add(self, line: str) -> list[int]:
        """Adds a message of the user; returns the token ids of the conversation.

        Drops the oldest turns if it is too long for the context, but not the system message. Raises
        UserError, and adds nothing, if the message alone is too long or the template rejects it.
        """
        messages = [*self.messages, {'role': 'user', 'content': line}]
        first = int(messages[0]['role'] == 'system')
        n_dropped = 0
        while len(ids := self.form.encode(messages)) > self.room:
            if len(messages) == first + 1:
                raise UserError(
                    f'with the template it has {len(ids):,} tokens, but only {self.room:,} fit '
                    f'into the context together with an answer'
                )
            del messages[first : first + 2]  # a message and its answer
            n_dropped += 1
        if n_dropped:
            turns = f'{n_dropped} turn{"s" * (n_dropped > 1)}'
            note(f'the context is full: the model no longer sees the oldest {turns}')
        self.messages = messages
        return ids

    def reply(self, model: GPT, ids: list[int], answer: Continuation, **sampling) -> str:
        """Shows an answer as it is generated, until a token that ends a turn.

        answer: what it is added to. Returns why the answer was cut; empty if it was not.
        """
        tokenizer, ends = self.form.tokenizer, self.form.ends
        n_tokens = min(self.max_new_tokens, self.block_size - len(ids))
        cut = ''
        space = b' ' if tokenizer.adds_space else b''  # that encoding puts in front of a text
        for tokens in model.generate([ids], n_tokens, stop=[[id] for id in ends], **sampling):
            token = int(tokens)
            if token in ends:
                break
            if token not in self.form.special:  # as with skip_special_tokens in transformers
                self.show(answer.add(tokenizer.decode_bytes([token]).removeprefix(space)))
                space = b''
                if answer.ended:  # by the stop text
                    break
        else:
            is_full = n_tokens < self.max_new_tokens
            why = 'the context is full' if is_full else 'use a larger --max_new_tokens'
            cut = f'the answer was cut off after {n_tokens:,} tokens: {why}'
        self.show(answer.add(b'', final=True))
        return cut


def read_lines() -> Iterator[str]:
    """Yields the lines of standard input that are not empty, with a prompt sign in a terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors='replace')  # a wrong byte should not end a conversation
    is_typed = sys.stdin.isatty()
    has_editing = is_typed and sys.stdout.isatty()
    if has_editing:
        with suppress(ImportError):  # Windows
            import readline  # noqa: F401 - gives input() arrow keys and a history
    try:
        while True:
            if has_editing:
                line = input(SIGN) + '\n'
            else:
                print(SIGN if is_typed else '', end='', file=sys.stderr, flush=True)
                line = sys.stdin.readline()
            if not line:
                print(end='\n' if is_typed else '', file=sys.stderr)
                return
            if message := line.removeprefix('\ufeff').strip():
                yield message
    except EOFError:  # Ctrl-D
        print(file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise


def note(text: str):
    warn(f'note: {text}')
