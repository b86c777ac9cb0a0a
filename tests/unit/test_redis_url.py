"""Redis URLs: what each form says, and what is refused with a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobq.broker.client import connect, connect_sync
from jobq.broker.url import read
from jobq.cli.masking import mask
from jobq.cli.options import REDIS_SCHEMES
from jobq.errors import ConfigurationError


def test_a_sentinel_url_names_the_sentinels_the_service_and_the_database() -> None:
    at = read("redis+sentinel://jobq:p%40ss@one:1,two,[::1]:3/main/4?client_name=x")

    assert (at.kind, at.service) == ("sentinel", "main")
    assert at.hosts == (("one", 1), ("two", 26379), ("::1", 3))
    assert at.options == {"db": 4, "username": "jobq", "password": "p@ss", "client_name": "x"}
    assert at.sentinel_options == {}


def test_a_sentinel_url_has_a_login_of_its_own_for_the_sentinels() -> None:
    at = read("rediss+sentinel://:secret@one/main?sentinel_username=watcher&sentinel_password=p%26w&ssl_ca_certs=/ca")

    assert at.options == {"db": 0, "password": "secret", "ssl": True, "ssl_ca_certs": "/ca"}
    assert at.sentinel_options == {"username": "watcher", "password": "p&w", "ssl": True, "ssl_ca_certs": "/ca"}


@pytest.mark.parametrize("end", ["", "/", "/0", "?db=0"])
def test_a_cluster_url_names_nodes_and_nothing_after_them(end: str) -> None:
    at = read(f"rediss+cluster://jobq:secret@one:7000,two{end}")

    assert (at.kind, at.service) == ("cluster", "")
    assert at.hosts == (("one", 7000), ("two", 6379))
    assert at.options == {"username": "jobq", "password": "secret", "ssl": True}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+sentinel://one:26379", "names no service"),
        ("redis+sentinel://one:26379/", "names no service"),
        ("redis+sentinel://one/main/zero", "must be a number, not 'zero'"),
        ("redis+sentinel:///main", "names no host"),
        ("redis+sentinel://one,,two/main", "a comma too many"),
        ("redis+sentinel://one:port/main", "names a host wrongly"),
        ("redis+sentinel://one/main?protocol=2", "`protocol`"),
        ("redis+sentinel://one/main?socket_timeout=1", "`socket_timeout`"),
        ("redis+sentinel://one/main?sentinel_pasword=x", "`sentinel_pasword`"),
        ("redis+sentinel://one/main?health_check_interval=often", "health_check_interval"),
        ("redis+sentinel://one/main?ssl=false", "`ssl`"),
        ("redis+cluster://[::1", "names a host wrongly"),
        ("redis+cluster://one/1", "no databases but 0"),
        ("redis+cluster://one?db=1", "no databases but 0"),
        ("redis+cluster://one/main", "no databases but 0, and no service"),
        ("redis+cluster://one?sentinel_password=x", "has no Sentinels"),
        ("redis+cluster://one?decode_responses=1", "`decode_responses`"),
        ("sentinel://one/main", "redis+sentinel://"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_and_its_secrets_are_not_shown(url: str, says: str) -> None:
    for make in (connect, connect_sync):
        with pytest.raises(ConfigurationError) as caught:
            make(url.replace("://", "://user:hunter2@"))
        assert says in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("login", ["user:hunter{}secret", ":hunter{}secret", "user:p@hunter{}secret"])
@pytest.mark.parametrize("form", ["redis+sentinel://{}@one", "redis+sentinel://{}@one/main", "redis+cluster://{}@one"])
@pytest.mark.parametrize("sign", "/?#")
def test_no_half_of_a_password_that_ends_too_early_is_shown(form: str, login: str, sign: str) -> None:
    assert_refused_without_a_word_of_it(form.format(login.format(sign)))


@pytest.mark.parametrize("sign", "/?#")
def test_nor_in_the_url_of_one_server(sign: str) -> None:
    assert_refused_without_a_word_of_it(f"redis://user:hunter{sign}secret@one")


def assert_refused_without_a_word_of_it(url: str) -> None:
    for make in (connect, connect_sync):
        with pytest.raises(ConfigurationError, match="percent-encode") as caught:
            make(url)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        assert not re.search("hunter|secret", str(caught.value))


@pytest.mark.parametrize("password", ["p[w", "p]w", "p\u2100w", "p:w", "p@w", "p,w", ""])
def test_a_password_may_be_as_it_is_where_nothing_else_can_be_meant(password: str) -> None:
    at = read(f"redis+sentinel://user:{password}@[::1],[::2]:1,three/main")

    assert at.hosts == (("::1", 26379), ("::2", 1), ("three", 26379))
    assert at.options == {"db": 0, "username": "user"} | ({"password": password} if password else {})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis+sentinel://u:pw@one:1,two:2/main", "redis+sentinel://u:***@one:1,two:2/main"),
        (
            "redis+sentinel://one:1,two:2/main?sentinel_password=pw",
            "redis+sentinel://one:1,two:2/main?sentinel_password=***",
        ),
        ("rediss+cluster://:p@w@one:1,two:2", "rediss+cluster://:***@one:1,two:2"),
        ("redis+cluster://one:1,two:2", "redis+cluster://one:1,two:2"),
    ],
)
def test_the_secrets_of_every_form_are_masked(url: str, shown: str) -> None:
    assert mask(url) == shown
    assert "pw" not in repr(read(url.replace("p@w", "pw")))


def test_the_page_shows_forms_and_urls_that_can_be_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
    forms = {form.partition("://")[0] for form in re.findall(r"`([a-z+]+://)", page)}
    urls = re.findall(r"JOBQ_REDIS_URL='([^']+)'", page)

    assert forms == set(REDIS_SCHEMES)
    assert [read(url).kind for url in urls] == ["sentinel", "cluster"]


def test_the_command_line_takes_every_form_and_no_other() -> None:
    for scheme in REDIS_SCHEMES:
        read(f"{scheme}://one{'/main' if 'sentinel' in scheme else ''}")
    with pytest.raises(ConfigurationError) as caught:
        read("redis+proxy://one")
    assert all(f"{scheme}://" in str(caught.value) for scheme in REDIS_SCHEMES)


def test_the_page_of_roles_names_what_sentinels_and_a_cluster_need_beside_its_lines() -> None:
    page = (Path(__file__).parents[2] / "docs" / "roles.md").read_text()
    for rights in ("+@connection +sentinel|get-master-addr-by-name", "+asking", "+cluster|slots"):
        assert f"`{rights}`" in page
