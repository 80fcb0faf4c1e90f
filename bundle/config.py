"""Model configurations of Triton, `config.pbtxt`, as the messages that they are."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

_HEAD = (
    "# Written by python -m export repository; the configs in model_repository/ say what each "
    "value means.\n"
)


class ConfigError(ValueError):
    """A model's configuration is missing or not as it was assembled. One line."""


def read(path: Path) -> ModelConfig:
    """A model's configuration.

    Raises:
        ConfigError: it is missing, or none.
    """
    try:
        return text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; assemble with python -m export repository"
        ) from None
    except (UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigError(
            f"{path} is no model configuration ({' '.join(str(error).split())}); assemble again "
            "with python -m export repository"
        ) from None


def text(config: ModelConfig) -> str:
    """The text of a configuration; of equal ones the same, with one release of protobuf."""
    return _HEAD + str(text_format.MessageToString(config))


def parameter(config: ModelConfig, key: str) -> str:
    """The value of one parameter.

    Raises:
        ConfigError: the configuration has no such parameter.
    """
    if key not in config.parameters:  # which would be made, empty, by looking at it
        raise ConfigError(
            f"the config.pbtxt of {config.name or 'the router'} has no parameter {key!r}; assemble "
            "again with python -m export repository"
        )
    return str(config.parameters[key].string_value)


def set_parameter(config: ModelConfig, key: str, value: str) -> None:
    """Give one parameter that is there another value.

    Raises:
        ConfigError: the configuration has no such parameter.
    """
    parameter(config, key)
    config.parameters[key].string_value = value
