"""Files of others: nothing is read before kind and size are known, and no JSON takes Python by surprise."""

import os

import pytest

from megatrain.untrusted import leads_out, parse_json, read_beside, read_plain


def test_a_plain_file_of_the_right_size_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_plain(path, 5) == b"12345" == read_beside(path, 5)
    with pytest.raises(ValueError, match="it has 5 bytes, and 4 at the most are read"):
        read_plain(path, 4)
    link = tmp_path / "link"
    link.symlink_to("a")
    assert read_plain(link, 5) == b"12345" == read_beside(link, 5)
    with pytest.raises(ValueError, match="it is a link, to a"):
        read_plain(link, 5, follow=False)


def test_no_device_fifo_or_folder_is_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero"):
        with pytest.raises(ValueError, match="it is no plain file"):
            read_plain(tmp_path / name, 5)
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        read_plain(tmp_path, 5)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="it has 1,099,511,627,776 bytes"):
        read_plain(tmp_path / "huge", 1 << 30)


def test_links_of_the_hubs_cache_stay_in_its_repository_and_others_in_their_folder(tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots/0123", cache / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (tmp_path / "secret").write_text("hush")
    for name, target in (("config.json", "../../blobs/hash"), ("tokenizer_config.json", "../../../secret")):
        (snapshot / name).symlink_to(target)
    assert read_beside(snapshot / "config.json", 9) == b"{}"
    assert not leads_out(snapshot / "config.json") and leads_out(snapshot / "tokenizer_config.json")
    with pytest.raises(ValueError, match=r"a link that leads out of its folder, to .*/secret: put the file itself there"):
        read_beside(snapshot / "tokenizer_config.json", 9)
    plain = tmp_path / "model"
    plain.mkdir()
    (plain / "config.json").symlink_to("../models--a--b/blobs/hash")
    assert leads_out(plain / "config.json")


@pytest.mark.parametrize(
    ("folder", "target", "out"),
    [
        ("datasets--a/snapshots/0", "../../blobs/hash", False),
        ("models--a/snapshots/0", "../../refs/main", True),
        ("models--a/snapshots/0", "../1/config.json", True),
        ("models--a/snapshots/0", "../../linked/id_rsa", True),
        ("home/snapshots/0", "../../blobs/hash", True),
        ("home/snapshots/0", "../../.ssh/id_rsa", True),
        ("models--a/other/0", "../../blobs/hash", True),
        ("home/snapshots/0", "beside", False),
    ],
)
def test_only_the_blobs_of_a_repository_in_the_hubs_cache_are_led_to(tmp_path, folder, target, out):
    (tmp_path / folder).mkdir(parents=True)
    for name in (".ssh", "blobs"):
        (tmp_path / folder).parents[1].joinpath(name).mkdir()
    (tmp_path / folder / "tokenizer_config.json").symlink_to(target)
    assert leads_out(tmp_path / folder / "tokenizer_config.json") == out


def test_blobs_that_are_a_link_to_secrets_are_no_blobs(tmp_path):
    snapshot = tmp_path / "models--a/snapshots/0"
    snapshot.mkdir(parents=True), (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_rsa").write_text("PRIVATE KEY")
    (tmp_path / "models--a/blobs").symlink_to("../.ssh")
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/id_rsa")
    assert leads_out(snapshot / "tokenizer_config.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "a key appears twice"),
        ('{"a": ' + "9" * 10_000 + "}", "it has a number of 10,000 digits, 99999999999999999999"),
        ("[" * 100_000, "it is nested too deep"),
        ("[" + "[]," * 9 + "[]]", "it has 11 brackets, and 10 at the most are read"),
        ('{"a"', "Expecting"),
    ],
)
def test_a_hostile_text_is_a_value_error(text, said):
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match=said):
            parse_json(form, 10 if "," in text and "[" in text else 1 << 20)


def test_an_honest_text_is_read():
    assert parse_json('{"a": [1, -2, 3.5, "[[{{"]}') == {"a": [1, -2, 3.5, "[[{{"]}
    assert parse_json('{"a": 1, "a": 2}', unique=False) == {"a": 2}
