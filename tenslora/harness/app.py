"""The command line of train.py and sweep.py: Hydra's entry point, except that a user's mistake prints as one line.

Hydra is imported where it is used, so that Ctrl-C is caught from the first moment.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError, first_line, os_reason
from tenslora.harness.cache import forget_all
from tenslora.harness.commands import (
    CARRIAGE_RETURN,
    CONF,
    FULL_ERROR,
    OUT_OF_REACH,
    is_text,
    line_of_the_environment,
    prepare_process,
    several_settings,
    takes_one,
    unforeseen,
)
from tenslora.harness.console import asking_nobody
from tenslora.harness.stop import Stop

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

OF_LOGGING = "Unable to configure "
"""How Python's errors begin where the settings of the logs cannot be used."""

_NOT_THERE = r"provider=hydra\.searchpath in [\w-]+, "
"""How Hydra's warning begins of a folder of config files that is not there."""

_OPTIONS = (
    "help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion", "config-path",
    "config-name", "config-dir", "experimental-rerun", "info",
)  # fmt: skip
"""Hydra's options."""

_WATCH_SECONDS = 2.0


def run_app(
    task: Callable[[DictConfig], Any], config_name: str, sweep: Callable[[DictConfig, Any, Any], None] | None = None
) -> None:
    """Run `task` on the config that Hydra composes from conf/ and the command line.

    An error ends the process with status 1 and one line on standard error, and the line is in the run's log too, with
    the traceback where it is no user's mistake; HYDRA_FULL_ERROR=1 prints the traceback. In a multirun the line goes to
    the job's log, Hydra goes on with the other jobs, and the process ends with status 1. Ctrl-C or SIGTERM ends the
    process with status 130.

    Args:
        task: carries out one job.
        config_name: the name of the main config file in conf/.
        sweep: decides which jobs of a multirun are carried out; see `hydra_plugins.tenslora_sweeps.TableSweeper`. None
            for an application without a table.
    """
    prepare_process()
    forget_all()
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # an empty line of a file of variables, which sets nothing
    for word in sys.argv[1:]:
        # Hydra would write into the current folder, or into one that is called None.
        if re.fullmatch(r"hydra\.(run|sweep)\.dir=(null|\?\?\?|''|\"\")?", word):
            sys.exit(f"error: {word}: must be a folder")
        if re.match(r"""\+*hydra\.(run|sweep)\.dir=["']*~""", word):  # Hydra would make a folder of that name
            sys.exit(f"error: {TensLoRAError(word)}: must be written without ~, such as with $HOME in its place")
        if re.match(r"\+*hydra\.(run|sweep)\.dir=[^$]*://", word):
            sys.exit(f"error: {TensLoRAError(word)}: must be a path on disk, not an address")
        if sweep and re.match(r"\+*hydra\.mode=(?!MULTIRUN$)", word, re.IGNORECASE):  # would leave a run's folder
            sys.exit(f"error: {TensLoRAError(word)}: must be MULTIRUN for sweep.py; train.py carries out single runs")
        if re.fullmatch(r"\+*hydra\.job\.chdir=(?!(false|null)$).*", word, re.IGNORECASE | re.DOTALL):
            sys.exit(f"error: {TensLoRAError(word)}: must be false, because paths are relative to the current folder")
        if re.match(r"\++hydra\.searchpath=", word):  # which Hydra would not look at
            sys.exit(f"error: {TensLoRAError(word)}: must be written without +")
        if sweep and re.match(r"\+*hydra/sweeper=(?!table$)", word):
            sys.exit(f"error: {TensLoRAError(word)}: must be table for sweep.py; train.py -m takes other sweepers")
        if sweep and re.match(r"\+*hydra\.sweep\.subdir=", word):  # the results are read from the runs' own folders
            sys.exit(f"error: {TensLoRAError(word)}: must be left out; hydra.sweep.dir is the folder of all runs")
        if (group := re.match(r"\+*([a-z_]+)=\[[^,]*,", word)) and takes_one(group[1]):
            several = "" if group[1] in ("table", "tune") else f"; several are written {group[1]}=a,b with -m"
            sys.exit(f"error: {TensLoRAError(word)}: must be one option{several}")
        if line := several_settings(word) or _not_an_option(word):
            sys.exit(f"error: {TensLoRAError(line)}")
        if not is_text(word):
            sys.exit(f"error: {TensLoRAError(word)}: must be text in UTF-8")
        if not word:
            sys.exit("error: the command line: has an empty word, as of a shell variable that is not set; leave it out")
        if word.endswith("\r"):
            sys.exit(f"error: {TensLoRAError(word)}: {CARRIAGE_RETURN}")
    with contextlib.suppress(OSError):
        if "${" in (here := os.getcwd()):  # which Hydra would take for a reference to a setting
            sys.exit(f"error: {TensLoRAError(here)}: the path of the current folder must not contain ${{")
    sys.argv[1:] = _settings_together(sys.argv[1:])
    for line in _given_again(sys.argv[1:]):
        print(TensLoRAError(line), file=sys.stderr)
    if line := next(filter(None, (_of_base(word, config_name) for word in sys.argv[1:])), None):
        sys.exit(f"error: {TensLoRAError(line)}")
    full_error = os.environ.get(FULL_ERROR)
    signals = contextlib.ExitStack()
    stop = signals.enter_context(Stop())
    guarded = _Task(task, sweep, stop, wants_traceback=full_error == "1")
    # With this setting Hydra raises its own errors instead of printing them over several lines.
    os.environ[FULL_ERROR] = "1"
    # A launcher starts jobs in other processes, perhaps on other machines, which have to find this package.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CONF.parent), os.environ.get("PYTHONPATH"))))
    # Python would look in the current folder first, where a user may have a train.py or another clone.
    os.environ["PYTHONSAFEPATH"] = "1"
    if not sys.stderr.isatty():  # the datasets library would fill a log with its progress bars
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.raiseExceptions = False  # a log that cannot be written, as on a full disk, would print tracebacks
    try:
        import hydra

        from tenslora.harness.config import register_resolvers
        from tenslora.harness.config.yaml_files import name_files_at_fault

        register_resolvers()
        name_files_at_fault()
        warnings.filterwarnings("error", _NOT_THERE)  # which would blame an option of that folder
        given = _given()
        if sweep and given.config_name == "config":
            sys.exit("error: --config-name config: is for train.py; leave it out")
        if given.cfg == "hydra" and given.resolve:  # hydra.run.dir follows from the settings, which Hydra leaves out
            sys.exit("error: --cfg hydra --resolve: must be --cfg all --resolve, or without --resolve")
        if {"-sc", "--shell-completion"}.intersection(sys.argv):
            from tenslora.harness.completion import check_completion, complete_options_in_folders

            check_completion(sys.argv[1:])
            complete_options_in_folders()
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except (KeyboardInterrupt, Exception) as error:
        if stop.asked or isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        if guarded.wants_traceback:
            raise
        if any(word.startswith("query=") for word in sys.argv) and "COMP_LINE" in os.environ:
            sys.exit(1)  # a shell asks about a half-typed line, and would show an error in the middle of it
        # Until the task begins, the mistake is in the command line, in conf/ or in the output folder.
        line = _line(error, None if guarded.started else config_name) or unforeseen(error)
        sys.exit(f"error: {line}")
    finally:  # for a notebook, whose next command is in the same process
        signals.close()
        os.environ.pop(FULL_ERROR, None)
        if full_error is not None:
            os.environ[FULL_ERROR] = full_error


class _Task:
    """The function that Hydra calls for each job, in this process or a launcher's. `TableSweeper` calls its `sweep`."""

    def __init__(
        self, task: Callable[[DictConfig], Any], sweep: Callable[..., None] | None, stop: Stop, wants_traceback: bool
    ) -> None:
        self.task, self._sweep, self._stop, self.wants_traceback = task, sweep, stop, wants_traceback
        self.started = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A launcher unpickles the task in a process that has not called `run_app`.
        from tenslora.harness.config import register_resolvers

        register_resolvers()
        logging.raiseExceptions = False  # as in `run_app`
        vars(self).update(state)

    def __call__(self, composed: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        self.started = True
        end_with_the_launcher()
        in_multirun = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            _refuse_hidden_files(HydraConfig.get().runtime.config_sources)
            _check_formats()
            with asking_nobody() if self._sweep else contextlib.nullcontext():
                return self.task(composed)
        except TensLoRAError as error:
            line = str(_line(error))
            if not in_multirun:
                _log_to_file(line)
            if self.wants_traceback:
                raise
        except BaseException as error:
            if in_multirun and isinstance(error, Exception):
                log.error("error: %s", _line(error) or unforeseen(error))
            if not in_multirun or isinstance(error, Exception):
                _log_to_file("interrupted" if self._stop.asked else "the run failed", error)
            if in_multirun or self._stop.asked or self.wants_traceback or not isinstance(error, Exception):
                raise
            line = _line(error) or unforeseen(error)  # for Hydra would print a line of its own before it
        # The error is raised anew outside of the except block, without the frames that hold the model: Hydra keeps
        # each job's error until the last job of a multirun is over, and launchers pickle it.
        if not in_multirun:
            sys.exit(f"error: {line}")
        log.error("error: %s", line)
        raise TensLoRAError(line)

    def sweep(self, config: DictConfig, jobs: Any, launch: Any) -> None:
        if self._sweep is None:
            raise TensLoRAError("hydra/sweeper=table: is for sweep.py, which has a table to carry out")
        self.started = True
        _refuse_hidden_files(config.hydra.runtime.config_sources)
        self._sweep(config, jobs, launch)


def _check_formats() -> None:
    """Refuse a format of the logs that fits no message, because Python's logs would then be empty."""
    record = logging.LogRecord(__name__, logging.INFO, __file__, 0, "a message", None, None)
    for handler in logging.getLogger().handlers:
        try:
            handler.format(record)
        except ValueError as error:
            written = getattr(handler.formatter, "_fmt", None)
            raise TensLoRAError(f"hydra.job_logging: cannot use the format {written} ({first_line(error)})") from error


def _refuse_hidden_files(sources: Any) -> None:
    """Refuse files of a user's own folder of configs that Hydra does not read, because conf/ comes first.

    Args:
        sources: the folders and packages of configs, as Hydra lists them.
    """
    own = [Path(source.path) for source in sources if source.schema == "file" and Path(source.path) != CONF]
    for folder in own:
        for file in CONF.rglob("*.yaml"):
            name = file.relative_to(CONF)
            if (folder / name).is_file() and (folder / name).read_bytes() != file.read_bytes():
                raise TensLoRAError(
                    f"{folder / name}: would not be read, because {file} comes first; give it another name"
                )


def _not_an_option(word: str) -> str | None:
    """The line for a word that begins with a hyphen and is none of Hydra's options, which argparse may shorten."""
    if re.fullmatch("-[^-hcprmsi].*", word):
        return f"{word}: is no option; --help lists all"
    option = re.fullmatch(r"--([\w.@/-]+)(=.*)?", word)
    if option is None:
        return None
    name = option[1]
    meant = [each for each in _OPTIONS if each.startswith(name)]
    if len(meant) == 1 or name in meant:
        return None
    if meant:
        return f"{word}: must be one of {', '.join(f'--{each}' for each in meant)}"
    if name in ("local-rank", "local_rank"):
        return f"{word}: is what torch.distributed.launch adds; use torchrun"
    if option[2]:
        return f"{word}: must be written {word[2:]}, without hyphens (W&B's agent: ${{args_no_hyphens}})"
    return f"{word}: is no option; a setting is written name=value, such as optimizer.lr=0.001"


def _of_base(word: str, config_name: str) -> str | None:
    """The line for a word that chooses a file of a folder base, which is there for other files to extend."""
    chosen = re.match(r"\+*(\w+)=(?:.*,)?base/", word)
    if chosen is None or not (CONF / chosen[1] / "base").is_dir() or (chosen[1], config_name) == ("table", "config"):
        return None
    from tenslora.harness.config.spelling import misspelt

    return misspelt([word], CONF, config_name, _given().config_dir)


def _settings_together(words: Sequence[str]) -> list[str]:
    """The words of a command line with all settings behind the options, if an option stands between two settings.

    argparse would take the settings before the option, and say that it does not recognize the others.

    >>> _settings_together(["seed=1", "--config-dir", "mine", "dataset=mine"])
    ['--config-dir', 'mine', 'seed=1', 'dataset=mine']
    """
    are_settings = [not word.startswith("-") and ("=" in word or word.startswith("~")) for word in words]
    if sum(each for each, _ in groupby(are_settings)) < 2:
        return list(words)
    return [word for order in (False, True) for word, each in zip(words, are_settings, strict=True) if each is order]


def _given_again(words: Sequence[str]) -> Iterator[str]:
    """A line for each setting that stands several times in a row with other values, as bash writes seed={0..2}.

    A list of values, which bash does not write so, is meant to replace what is before it.

    >>> list(_given_again(["seed=0", "seed=1", "optimizer.lr=0.1", "seed=1", "seed=1"]))
    ['seed=0 seed=1: only seed=1 counts; several values are written seed=0,1, with -m or for sweep.py']

    Args:
        words: the words of a command line. A later one that a script adds behind others replaces an earlier one.
    """
    for name, group in groupby(words, lambda word: "".join(re.findall(r"^(?!hydra)[\w./@]+=(?=[\w.+-]+$)", word))):
        given = list(group)
        if name and len(values := dict.fromkeys(word.removeprefix(name) for word in given)) > 1:
            yield (
                f"{' '.join(given)}: only {given[-1]} counts; several values are written {name}{','.join(values)}, "
                f"with -m or for sweep.py"
            )


def _log_to_file(line: str, error: BaseException | None = None) -> None:
    # The console shows the line in another way.
    trace = (type(error), error, error.__traceback__) if isinstance(error, Exception) else None
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, line, (), trace)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


@cache  # one thread for all jobs of a process
def end_with_the_launcher() -> None:
    """Let this process end soon after the one that started it, if a launcher started it on this machine.

    A launcher that is killed outright cannot stop its workers, which would train on and keep their memory. Processes
    that multiprocessing did not start, such as a Slurm job, know no such parent and go on.
    """
    parent = parent_process()
    if parent is None or parent.pid is None:
        return
    number = parent.pid

    def watch() -> None:
        while os.getppid() == number:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _line(error: BaseException, config_name: str | None = None) -> str | None:
    """The line for a user's mistake; None for any other error.

    Args:
        error: the error.
        config_name: the name of the main config file if the task had not begun, so that the mistake is in the command
            line, in conf/ or in the output folder; otherwise None.
    """
    # ${run_folder:} checks the settings, and OmegaConf wraps the error of a resolver.
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, TensLoRAError):
            return _joined(cause)
        if own := re.match(r"Error locating target '([^']*)'.*\s*full_key: (hydra\.callbacks\.\S*)", str(cause)):
            return f"{own[2]}._target_={own[1]}: cannot be imported ({first_line(causes[-1])})"
        if line := _of_searchpath(cause) or line_of_the_environment(cause):
            return line
    from tenslora.harness.launch_check import unresolved

    if line := next(filter(None, map(unresolved, causes)), None):
        return line
    if config_name and (pickled := _given().experimental_rerun):
        return f"--experimental-rerun {pickled}: must be a config.pickle that Hydra has written ({_joined(error)})"
    for cause in causes:
        # Hydra's own OSErrors, which are about conf/, have no number.
        if isinstance(cause, OSError) and cause.errno and (cause.errno in OUT_OF_REACH or config_name):
            is_read = config_name is None and cause.errno in (errno.EACCES, errno.EPERM)  # or perhaps written
            failed = "used" if is_read or cause.errno == errno.ENAMETOOLONG else "written"
            return f"{cause.filename or _output_folder()}: cannot be {failed} ({os_reason(cause)})"
    if any(str(cause).endswith("embedded null byte") for cause in causes):
        return "hydra.run.dir, hydra.sweep.dir and hydra.job.name: must not hold a NUL, which YAML writes as \\0"
    for cause in causes:
        if str(cause).startswith(OF_LOGGING):
            at_fault = " ".join(word for word in sys.argv[1:] if re.match(r"\+*hydra[./](job|hydra)_logging", word))
            reasons = [str(each) for each in (cause, cause.__cause__) if each]
            if "\n" in reasons[-1]:  # the traceback of a launcher's process
                reasons.pop()
            return f"{at_fault or 'hydra.job_logging, hydra.hydra_logging'}: cannot be used ({': '.join(reasons)})"
    if config_name is None:
        return None
    from tenslora.harness.config.checks import DEEPEST
    from tenslora.harness.config.spelling import misspelt, parsed, unreadable, wrong_file

    given = _given()
    words: list[str] = given.overrides
    of_tables = (word for word in words if word.partition("=")[0].lstrip("+") in ("table", "tune"))
    if config_name == "config" and (word := next(of_tables, None)):
        return f"{word}: is a setting of sweep.py, which carries out the runs of a table"
    own = given.config_dir
    if own and not os.path.isdir(own):
        return f"--config-dir {TensLoRAError(own)}: must be one folder, which has a folder for each group in it"
    of_sweeper = [match for word in words if (match := re.match(r"\+*hydra\.sweeper\.params\b\.?(.*)", word))]
    chooses = given.config_name or any(word.lstrip("+").startswith("hydra/sweeper=") for word in words)
    if config_name == "config" and of_sweeper and not chooses:  # Hydra's basic sweeper has no params to change
        settings = re.sub(r"^=\{([\w./]+): *([^,:]+)\}$", r"\1=\2", of_sweeper[0][1])
        typed = settings if re.match(r"[\w./]+=", settings) else "seed=0,1"
        return f"{of_sweeper[0][0]}: must be written as the setting itself with its values, as in -m {typed}"
    if isinstance(error, RecursionError):
        for word in words:
            if word.count("[") + word.count("{") > DEEPEST:
                return f"{word.partition('=')[0]}: must not be nested more than {DEEPEST} levels deep"
    if line := misspelt(words, CONF, config_name, own) or wrong_file(error):
        return line
    if given_twice := re.match(r"Multiple values for (\S+)\. ", str(error)):
        group = given_twice[1]
        if word := next((word for word in words if word.startswith(f"+{group}=")), None):
            return f"{word}: {group} has an option already, which is changed without the +"
        return f"a config file's defaults choose {group} a second time; write it there as - override /{group}: ..."
    several = (word for word in words if "--multirun" in str(error) and word in str(error))
    if word := next(several, None):  # Hydra's error for several values without -m
        if config_name != "sweep":
            way = "add -m for a run of each, or use sweep.py; a list needs brackets, as [a,b]"
            return f"{word}: is several values; {way}"
        # Hydra did not get as far as hydra.mode, because another word is wrong.
        error = _error_without(word, words, own) or error
        causes = list(_causes(error))
        if line := wrong_file(error):
            return line
    for word in sys.argv[1:]:
        odd = next((c for c in word if not c.isascii() and unicodedata.category(c)[0] not in "LMN"), None)
        if odd and not parsed(word):
            name = unicodedata.name(odd, f"U+{ord(odd):04X}")
            return f"{TensLoRAError(word)}: is no setting that Hydra can read; it holds {odd} ({name})"
    if word := next((word for word in words if "=" not in word and not word.startswith("~")), None):
        return f"{TensLoRAError(word)}: must be written name=value; several values have commas between them, as a=0,1"
    for word in words:
        if str(error) == f"Error merging override {word}" and any("Cannot merge" in str(cause) for cause in causes):
            return f"{word}: must be {'a dictionary' if word.partition('=')[2].startswith('[') else 'a list'}"
        if str(error) == f"Error merging override {word}" and len(causes) > 1:
            return f"{word}: cannot be set ({first_line(causes[1])})"
    if word := next((word for word in words if "=" in word and not parsed(word)), None):
        return unreadable(word)
    # Errors of Hydra's code, which do not name the setting.
    if isinstance(error, (KeyError, AssertionError, TypeError, AttributeError)):
        of_hydra = [word for word in words if re.match(r"\+*hydra\.(?!(run|sweep)\.)", word)]
        said = ": ".join(filter(None, (type(error).__name__, _joined(error) if str(error) else "")))
        return f"{' '.join(of_hydra) or 'the settings of hydra'}: cannot be used by Hydra ({said})"
    return _joined(error)


def _of_searchpath(error: BaseException) -> str | None:
    """The line for folders of config files that Hydra cannot use; None for any other error."""
    if re.match("hydra.searchpath must be a list|No config source registered for schema ", str(error)):
        word = next((word for word in sys.argv[1:] if word.startswith("hydra.searchpath=")), "hydra.searchpath")
        return f"{word}: must be a list of folders and packages, as [file://mine,pkg://my_package.conf]"
    if missing := re.match(_NOT_THERE + "path=(.*) is not available", str(error)):
        return f"hydra.searchpath: {missing[1]}: no such folder or package"
    return None


def _given() -> Any:
    """The command line as Hydra reads it."""
    from hydra._internal.utils import get_args

    return get_args(sys.argv[1:])


def _error_without(several: str, words: Sequence[str], own: str | None) -> Exception | None:
    """What Hydra says of the words of a sweep's command line besides those of several values."""
    from hydra import compose
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from tenslora.harness.config.spelling import reading

    parsed = OverridesParser.create().parse_overrides([word for word in words if word != several])
    try:
        with reading(CONF, own):
            compose("sweep", [str(each.input_line) for each in parsed if not each.is_sweep_override()])
    except Exception as error:
        return error
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _joined(error: BaseException) -> str:
    # An error from a data worker comes wrapped in the worker's traceback; its own message is the last line.
    text = str(error) or type(error).__name__
    if "Original Traceback" in text:
        text = text.replace("\\n", "\n").strip().splitlines()[-1].partition(": ")[2]  # TensLoRAError has escaped it
    return " ".join(text.split())


def _output_folder() -> str:
    # Hydra has forgotten its config by now.
    given = [word for word in sys.argv[1:] if word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    return given[-1].partition("=")[2] if given else "outputs"
