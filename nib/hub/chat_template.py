"""The chat template of an open model: how a conversation becomes one text.

It is a Jinja template in chat_template.jinja or tokenizer_config.json, rendered as transformers
does it. It comes from elsewhere, so it runs in Jinja's sandbox.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version

from nib.errors import UserError, optional
from nib.hub.files import Repository

SAFE_JINJA = [3, 1, 6]  # templates can leave the sandbox of older versions


@dataclass(frozen=True)
class ChatTemplate:
    """A model's template, and what it and a conversation need from the model's other files."""

    source: str
    where: str  # the file, for messages
    tokens: dict[str, str]  # variables of the template: bos_token, eos_token
    end_ids: frozenset[int]  # tokens that end a turn, by config.json and generation_config.json

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Returns the text of a conversation, up to where the model's answer begins.

        messages: dictionaries with 'role' (system, user or assistant) and 'content'.
        Raises UserError if the template is not valid or rejects the conversation.
        """
        environment = _environment()
        try:
            template = environment.from_string(self.source)
            return template.render(messages=messages, add_generation_prompt=True, **self.tokens)
        except Exception as error:  # whatever a template can do wrong
            raise UserError(
                f'{self.where}: the chat template does not accept this conversation '
                f'({type(error).__name__}: {error})'
            ) from error


def read_chat_template(repository: Repository) -> ChatTemplate | None:
    """Returns a model's chat template; None if it has none. Raises UserError for a damaged file."""
    config = repository.read_json('tokenizer_config.json')
    source, where = config.get('chat_template'), f'tokenizer_config.json of {repository.name}'
    if isinstance(source, list):  # several, for different purposes
        named = [entry for entry in source if isinstance(entry, dict)]
        source = next((e.get('template') for e in named if e.get('name') == 'default'), None)
    if path := repository.find('chat_template.jinja'):
        where = str(path)
        try:
            source = path.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{path} cannot be read ({error}); download it again') from error
    if not isinstance(source, str):
        return None
    tokens = {}
    for key, value in config.items():
        content = value.get('content') if isinstance(value, dict) else value
        if key.endswith('_token') and isinstance(content, str):
            tokens[key] = content
    end_ids = set()
    for file in ('generation_config.json', 'config.json'):
        found = repository.read_json(file).get('eos_token_id')
        end_ids |= {id for id in (found if isinstance(found, list) else [found]) if type(id) is int}
    return ChatTemplate(source, where, tokens, frozenset(end_ids))


def _environment():
    """Returns what templates expect: transformers' settings, functions and tags."""
    with optional('jinja2', '--chat'):
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        found = version('jinja2')  # ImportError if it is not known
    if [*map(int, re.findall('[0-9]+', found)[:3])] < SAFE_JINJA:
        raise UserError(
            f'--chat needs jinja2 {".".join(map(str, SAFE_JINJA))} or later, because templates can '
            f'leave the sandbox of {found}: pip install --upgrade jinja2'
        )

    class Generation(Extension):
        """{% generation %} marks answers for training; here, it has no effect."""

        tags = {'generation'}  # noqa: RUF012 - Jinja's interface

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Jinja's own escapes HTML.
    environment.filters['tojson'] = partial(json.dumps, ensure_ascii=False)
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda form: datetime.now().strftime(form)
    return environment
