"""The secret of a job: the variable, or the file of the user that one rank of several makes, and nobody else may read."""

import stat
from threading import Thread

import pytest

from megatrain.runtime.launch import Launch, LaunchError
from megatrain.runtime.secret import FILE, SecretError, of_user, shared_secret

RANKS = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
APART = RANKS | {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "198.51.100.7"}
GIVEN = {"MEGATRAIN_SECRET": "0123456789abcdef"}


def test_ranks_that_start_together_have_one_secret_that_is_theirs_alone(tmp_path):
    path, found = tmp_path / FILE, []
    ranks = [Thread(target=lambda: found.append(of_user(path))) for _ in range(8)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 8 and set(found) == {path.read_text()} and len(found[0]) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [one.name for one in path.parent.iterdir()] == ["secret"]


def test_a_secret_that_others_may_read_or_that_is_none_is_refused(tmp_path):
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef")
    path.chmod(0o640)
    with pytest.raises(SecretError, match=r"may be read or written by others\. Remove it"):
        of_user(path)
    path.chmod(0o600)
    assert of_user(path) == "0123456789abcdef"
    path.write_text("short")
    with pytest.raises(SecretError, match="no secret of 16 letters"):
        of_user(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(SecretError, match="cannot be read"):
        of_user(link)


def test_where_the_secret_comes_from(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert shared_secret(home | GIVEN, one_machine=True) == shared_secret(GIVEN, one_machine=False) == "0123456789abcdef"
    assert shared_secret(home, one_machine=False) == "" == shared_secret({}, one_machine=True)
    assert not (tmp_path / FILE).exists()
    assert shared_secret(home, one_machine=True) == (tmp_path / FILE).read_text()
    assert shared_secret({"HOME": "/dev/null"}, one_machine=True) == ""
    with pytest.raises(SecretError, match="has 3 letters, which can be guessed"):
        shared_secret({"MEGATRAIN_SECRET": "abc"}, one_machine=True)


def test_names_and_keys_of_the_store_follow_from_the_secret_and_show_nothing_of_it():
    plain, own = Launch.from_environment(RANKS), Launch.from_environment(RANKS | GIVEN)
    other = Launch.from_environment(RANKS | {"MEGATRAIN_SECRET": "another secret of 30 letters.."})
    assert (plain.store_prefix, plain.key) == ("megatrain", b"")
    assert len({plain.store_prefix, own.store_prefix, other.store_prefix}) == 3 == len({plain.key, own.key, other.key})
    again = Launch.from_environment(RANKS | GIVEN | {"RANK": "1", "LOCAL_RANK": "1"})
    assert (again.store_prefix, again.key) == (own.store_prefix, own.key)
    later = Launch.from_environment(RANKS | GIVEN | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert later.key == own.key, "the count of a machine that has come in the place of a lost one begins anew"
    assert GIVEN["MEGATRAIN_SECRET"] not in repr(own) + own.store_prefix + own.key.decode()
    with pytest.raises(LaunchError, match="openssl rand -hex 32"):
        Launch.from_environment(RANKS | {"MEGATRAIN_SECRET": "abc"})


def test_ranks_on_several_machines_without_a_secret_say_so_in_one_line():
    assert Launch.from_environment(APART).warning == (
        "MEGATRAIN_SECRET is not set: any process that reaches port 29500 of 198.51.100.7 could disturb this job. "
        "Set it, the same on all machines, to the output of `openssl rand -hex 32`."
    )
    assert Launch.from_environment(APART | GIVEN).warning == "" == Launch.from_environment(RANKS).warning == Launch().warning


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"MASTER_PORT": "99999"},
            r"MASTER_PORT=99999 is no port: they go from 1 to 65535\. Set it to a free one, for example 29500\.",
        ),
        ({"MASTER_PORT": "0"}, r"MASTER_PORT=0 is no port"),
        ({"RANK": "9" * 10_000}, r"RANK='9999999999999999999999999999999999999999'\.\.\. \(10000 letters\) is not a number\."),
        ({"WORLD_SIZE": "\u0664"}, "WORLD_SIZE='\u0664' is not a number"),
        ({"RANK": "7"}, r"rank 7 is not in a world of 2"),
    ],
)
def test_numbers_of_the_environment_that_cannot_be_are_told_in_one_line(variables, said):
    with pytest.raises(LaunchError, match=said) as caught:
        Launch.from_environment(RANKS | variables)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
