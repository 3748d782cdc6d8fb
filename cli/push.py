"""``merge push``: publish a finished folder; and the options of all commands that publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from merge import publishing
from merge.publishing import Published, Target

from .options import json_option, quiet_option
from .progress import progress_bar

__all__ = ["published_json", "push_command", "push_options", "target_of", "tell", "tell_published"]

F = TypeVar("F", bound=Callable[..., Any])

_PUSH = (
    click.option("--branch", help="Branch to publish on; made if it is not there. [default: main]"),
    click.option("--create-pr", is_flag=True, help="Propose the model in a pull request."),
    click.option(
        "--private/--no-private",
        default=None,
        help="Whether a repo that is made is private. [default: if an input is gated or private]",
    ),
    click.option("--commit-message", metavar="TEXT", help="First line of the commit."),
    click.option(
        "--token", metavar="TOKEN", help="A token that writes. [default: HF_TOKEN, or the login]"
    ),
)


def push_options(function: F) -> F:
    """The options that say how a model is published."""
    for option in reversed(_PUSH):
        function = option(function)
    return function


def target_of(
    repo: str,
    branch: str | None,
    create_pr: bool,
    private: bool | None,
    commit_message: str | None,
    token: str | None,
) -> Target:
    """The target that the options name."""
    return Target(repo, branch or "main", create_pr, private, commit_message, token)


def tell(quiet: bool) -> Callable[[str], None]:
    """What is told on the way goes to stderr."""
    return lambda text: None if quiet else click.echo(text, err=True)


@click.command("push", epilog="Example: merge push merged/ me/merged")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@push_options
@click.option("--resume/--fresh", default=True, help="Send what is missing, or all anew.")
@json_option
@quiet_option
def push_command(
    out: Path, repo: str, resume: bool, as_json: bool, quiet: bool, **how: Any
) -> None:
    """Publish the finished folder OUT as REPO (owner/name) on the Hub.

    OUT is checked as by `merge verify`. The model appears in one commit, or, if it has more than 50
    weight files, is complete with the last. After an interruption the same command resumes.
    """
    target = publishing.open_target(target_of(repo, **how))
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    with progress_bar(total, quiet=quiet) as advance:
        done = publishing.push_folder(
            out,
            target,
            fresh=not resume,
            progress=advance or (lambda _: None),
            notice=tell(quiet),
        )
    tell_published(done, quiet)
    click.echo(json.dumps(published_json(done), indent=2) if as_json else done.url)


def tell_published(done: Published, quiet: bool) -> None:
    """What was done, on stderr."""
    outcome = done.outcome
    say = tell(quiet)
    if not outcome.made:
        say("the model was there already, complete and checked")
        return
    say(f"{len(outcome.sent)} weight files sent, commit {outcome.commit[:12]} checked")
    for name in outcome.removed:
        say(f"removed the old {name}")


def published_json(done: Published) -> dict[str, object]:
    """What was done, as JSON data."""
    outcome = done.outcome
    return {
        "repo": done.target.repo,
        "branch": done.target.branch,
        "url": done.url,
        "commit": outcome.commit,
        "pull_request": outcome.pull,
        "private": done.private,
        "already_complete": not outcome.made,
        "sent": list(outcome.sent),
        "kept": list(outcome.kept),
        "removed": list(outcome.removed),
        "bytes_sent": outcome.bytes_sent,
    }
