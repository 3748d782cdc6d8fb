"""Before any work: whether a model may be published where it is meant to go, and as what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import quote

from merge.errors import OutputRefused, SinkError
from merge.write.hub import HubRepo

if TYPE_CHECKING:
    from httpx2 import Response

__all__ = ["Admission"]


class Admission(HubRepo):
    """A repo on the Hub before anything is sent to it."""

    def exists(self) -> bool:
        """Whether the repo is there, as far as the token can see."""
        return self.do("looking at the repo", self._is_there)

    def _is_there(self) -> bool:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self.api.repo_info(self.repo)
        except RepositoryNotFoundError:
            return False
        return True

    def check_right(self) -> None:
        """SinkError unless the token may write to the repo that is there, or make it."""
        if self.exists():
            write = not self.target.create_pr
            what = "asking for the right to write" if write else "asking for the right to read"
            self.do(what, partial(self._ask_right, write))
            return
        if self.target.create_pr:
            raise SinkError(
                "there is no such repo to propose a change to",
                repo=self.repo,
                do="leave --create-pr out, and the repo is made",
            )
        me = self.do("asking whose token it is", lambda: self.api.whoami())
        owner = self.repo.partition("/")[0]
        roles = {o.get("name"): o.get("roleInOrg") for o in me.get("orgs", [])}
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        if owner not in {me.get("name"), *roles} or roles.get(owner) == "read" or role == "read":
            raise SinkError(
                f"the token may not make repos of {owner}",
                repo=self.repo,
                found=f"a token of {me.get('name')} with the role {role}",
                do="give a token that writes, of a member of the owner: HF_TOKEN or --token",
            )

    def _ask_right(self, write: bool) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.auth_check(self.repo, write=write)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # the repo is there; this server has no such call
                raise

    def restricted(self, models: Sequence[str]) -> tuple[str, ...]:
        """Those of the Hub's ``models`` that are private, or given only to those who ask.

        One that the token does not see, or that is not there any more, says nothing.
        """
        return tuple(m for m in models if self.do("looking at an input", partial(self._hidden, m)))

    def _hidden(self, model: str) -> bool:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self.api.model_info(model)
        except RepositoryNotFoundError:
            return False
        return bool(info.private or info.gated)

    def check_privacy(self, restricted: Sequence[str]) -> bool | None:
        """Whether a repo is to be made private; None where the Hub decides, or it is there.

        restricted: inputs that not everyone may read. OutputRefused where the repo is public and
        nobody has said that this is meant.
        """
        wanted = self.target.private
        if not self.exists():
            return True if wanted is None and restricted else wanted
        if self.do("looking at the repo", lambda: self.api.repo_info(self.repo)).private:
            return None
        if wanted is True:
            raise OutputRefused(
                "the repo is public already, and --private is for repos that are made",
                repo=self.repo,
                do="make it private in its settings, or choose another",
            )
        if restricted and wanted is None:
            raise OutputRefused(
                "the repo is public, and not everyone may read what goes into it",
                repo=self.repo,
                found=f"gated or private: {', '.join(restricted)}",
                do="choose a private repo, or say that all may read it: --no-private",
            )
        return None

    def check_card(self, text: str | None) -> tuple[str, ...]:
        """What the Hub says of a card's front matter, short of errors, which are raised."""
        if text is None:
            return ()

        def ask() -> tuple[int, dict[str, list[dict[str, str]]]]:
            body = {"content": text, "repoType": "model"}
            response = self._ask("POST", "/api/validate-yaml", 400, json=body)
            return response.status_code, response.json()

        status, answer = self.do("checking the model card", ask, "README.md")
        if status == 400:
            found = "; ".join(e.get("message", "") for e in answer.get("errors", []))
            raise SinkError(
                "the Hub does not take the model card",
                repo=self.repo,
                file="README.md",
                found=found,
                do="mend its front matter; of a recipe's card, see --license and --no-card",
            )
        return tuple(w.get("message", "") for w in answer.get("warnings", []))

    def make(self, private: bool | None) -> None:
        """Make the repo and its branch, where they are not there."""
        create = not self.target.create_pr
        if create:
            self.do(
                "making the repo",
                lambda: self.api.create_repo(self.repo, private=private, exist_ok=True),
            )
        if create and self.target.branch != "main":
            self.make_branch(self.target.branch)

    def check_route(self) -> None:
        """SinkError where files would be sent by xet, and the server has none."""
        from huggingface_hub import constants

        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return

        def ask() -> int:
            branch = quote(self.target.branch, safe="")
            path = f"/api/models/{self.repo}/xet-write-token/{branch}"
            params = {"create_pr": "1"} if self.target.create_pr else None
            return self._ask("GET", path, 404, params=params).status_code

        if self.do("asking for the way to send files", ask) == 404:
            raise SinkError(
                "the server has no xet storage, by which the client would send files",
                repo=self.repo,
                found=f"no xet at {self.api.endpoint}",
                do="set HF_HUB_DISABLE_XET=1, and files are sent as plain LFS",
            )

    def _ask(
        self,
        method: str,
        path: str,
        expected: int,
        *,
        json: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Response:
        """The answer to a question that the client has no call for; errors but one are raised."""
        from huggingface_hub import utils

        headers = utils.build_hf_headers(token=self.target.token)  # type: ignore[attr-defined]
        session = utils.get_session()  # type: ignore[attr-defined]
        response = session.request(
            method, self.api.endpoint + path, headers=headers, json=json, params=params
        )
        if response.status_code != expected:
            utils.hf_raise_for_status(response)  # type: ignore[attr-defined]
        return response
