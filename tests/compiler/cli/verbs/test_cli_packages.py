"""Recipe packages: added by copy, pinned by the hash of their tree, and shut in their folder."""

import json
import os
import shutil
import subprocess
import time
import tomllib

import pytest
from effc.compiler.plugin import lockfile
from effc.compiler.plugin.recipe_packages import VENDORED, read_recipe_package

TIGHT = """effspec 1
\"\"\"Prune tightly.\"\"\"

data own = text("../data/few.txt", samples: 1, length: 16)
model any = zoo("tiny-llama")

pipeline tight(any) {
  slim = prune.blocks(remove: 1, score: perplexity(own))
}
"""
USER = """effspec 1
use edge.tight
model base = zoo("tiny-llama")

pipeline small(base) {
  slim = tight.tight()
}

emit small { hf("small") }
"""


def package(folder, recipe=TIGHT, version="1.0"):
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "effc-package.toml").write_text(
        f'name = "edge"\nversion = "{version}"\nsentence = "For small machines."\n'
    )
    (folder / "recipes" / "tight.effspec").write_text(recipe)
    (folder / "data" / "few.txt").write_text("And it came to pass in those days that there went out a decree. " * 9)
    return folder


@pytest.fixture
def added(effc, tmp_path):
    package(tmp_path / "theirs")
    (tmp_path / "r.effspec").write_text(USER)
    run = effc("add", "theirs")
    assert run.code == 0 and run.out.startswith("edge 1.0  ") and "For small machines." in run.out
    return tmp_path


def tree(folder):
    return tomllib.loads((folder / "effspec.lock").read_text())["packages"]["edge"]["tree"]


def test_a_recipe_uses_what_was_added_without_its_source(effc, added):
    shutil.rmtree(added / "theirs")
    assert effc("check", "r.effspec").out == "ok: small: 1 step, 1 artifact, 0 bounds\n"
    plan = json.loads(effc("plan", "r.effspec", "--format", "json", "-q").out)  # its data are read, too
    assert "prune.blocks" in json.dumps(plan)


def test_update_pins_what_the_source_holds_now(effc, added):
    before = tree(added)
    package(added / "theirs", TIGHT.replace("remove: 1", "remove: 2"), "1.1")
    assert effc("check", "r.effspec").code == 0 and tree(added) == before
    assert effc("update", "edge").out.startswith("edge 1.1  ") and tree(added) != before
    assert effc("update", "egde").code == 2


def test_a_vendored_package_is_found_where_the_cache_is_another(effc, added, tmp_path_factory):
    assert effc("vendor").code == 0
    other = tmp_path_factory.mktemp("other")
    assert effc("check", "r.effspec", "--cache-dir", other).code == 0
    shutil.rmtree(added / "effspec_packages")
    run = effc("check", "r.effspec", "--cache-dir", other)
    assert run.code == 5 and "error[package-gone]" in run.err and "r.effspec:2:5" in run.err
    assert effc("add", "--cache-dir", other).code == 0  # without a source: what the lock names
    assert effc("check", "r.effspec", "--cache-dir", other).code == 0


def test_a_vendored_copy_follows_an_update_once_it_is_vendored_again(effc, added):
    assert effc("vendor").code == 0
    package(added / "theirs", TIGHT.replace("remove: 1", "remove: 2"), "1.1")
    assert effc("update", "edge").code == 0
    run = effc("check", "r.effspec")
    assert run.code == 5 and "`effc vendor` then copies it here" in run.err
    assert effc("vendor").out.startswith("edge 1.1  ") and effc("check", "r.effspec").code == 0


def test_a_package_that_was_edited_is_refused(effc, added):
    assert effc("vendor").code == 0
    with open(added / "effspec_packages" / "edge" / "data" / "few.txt", "a") as file:
        file.write("more")
    run = effc("check", "r.effspec")
    assert run.code == 5 and "error[package-edited]" in run.err


@pytest.mark.parametrize(
    "path", ["../../secret.txt", "/etc/passwd", "~/secret.txt", "../data/../../x.txt", "a\\\\..\\\\x"]
)
@pytest.mark.parametrize(
    "line", ['data own = text("{}", samples: 1, length: 16)', 'use "{}" as own', 'param own: string = "{}"']
)
def test_a_recipe_of_a_package_names_nothing_outside_it(effc, tmp_path, path, line):
    text = TIGHT.replace('data own = text("../data/few.txt", samples: 1, length: 16)', line.format(path))
    theirs = package(tmp_path / "theirs", text)
    (tmp_path / "r.effspec").write_text(USER)
    (tmp_path / "secret.txt").write_text("secret")
    run = effc("add", "theirs")
    assert run.code == 3 and "error[outside-package]" in run.err and "recipes/tight.effspec:" in run.err
    assert not (tmp_path / "effspec.lock").exists()
    vendored(theirs, tmp_path)
    run = effc("check", "r.effspec")
    assert run.code == 3 and "error[outside-package]" in run.err


def vendored(theirs, project):
    """A package in a project that nobody asked when it was added: a clone has such, lock and all."""
    found = read_recipe_package(theirs)
    shutil.copytree(theirs, project / VENDORED / found.name)
    lock = lockfile.read_package_lock(project)
    lock["packages"][found.name] = {"source": "theirs", "version": found.version, "tree": found.tree}
    lockfile.write_package_lock(project, lock)


def test_a_package_that_turned_is_not_taken_by_an_update(effc, added):
    before = tree(added)
    package(added / "theirs", TIGHT.replace("../data/few.txt", "../../few.txt"), "1.1")
    run = effc("update", "edge")
    assert run.code == 3 and "error[outside-package]" in run.err and tree(added) == before


def link(folder):
    (folder / "data" / "few.txt").unlink()
    (folder / "data" / "few.txt").symlink_to("/etc/passwd")


def linked_folder(folder):
    (folder / "data" / "more").symlink_to("/etc")


def pipe(folder):
    os.mkfifo(folder / "data" / "pipe.txt")


def code(folder):
    (folder / "recipes" / "evil.py").write_text("print(1)")


def deep(folder):
    (folder / "/".join(["data", *"d" * 300])).mkdir(parents=True)


def nameless(folder):
    (folder / "effc-package.toml").write_text('name = "std"\nversion = "1"\n')


def no_toml(folder):
    (folder / "effc-package.toml").write_text("name = [")


@pytest.mark.parametrize("harm", [link, linked_folder, pipe, code, deep, nameless, no_toml])
def test_what_is_no_package_of_data_is_not_added(effc, tmp_path, harm):
    harm(package(tmp_path / "theirs"))
    run = effc("add", "theirs")
    assert run.code == 5 and "error[bad-package]" in run.err and not (tmp_path / "effspec.lock").exists()


def test_a_repository_is_fetched_by_add_alone(effc, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    theirs = package(tmp_path / "repository")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")

    def git(*args):
        return subprocess.run(["git", "-C", theirs, *who, *args], check=True, capture_output=True, text=True).stdout

    for args in (("init", "-q"), ("add", "."), ("commit", "-qm", "one"), ("tag", "v1")):
        git(*args)
    first = git("rev-parse", "HEAD").strip()
    (tmp_path / "r.effspec").write_text(USER)
    assert effc("add", f"file://{theirs}@v1", "--offline").code == 8
    assert effc("add", f"file://{theirs}@v2").code == 8
    assert effc("add", f"file://{theirs}@v1").code == 0
    assert tomllib.loads((tmp_path / "effspec.lock").read_text())["packages"]["edge"]["commit"] == first
    other = tmp_path_factory.mktemp("other")
    assert effc("check", "r.effspec", "--cache-dir", other).code == 5  # nothing is fetched unasked
    package(theirs, version="2.0")
    for args in (("commit", "-qam", "two"), ("tag", "-f", "v1")):
        git(*args)
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    assert effc("add", "--cache-dir", other).code == 0  # the commit of the lock, whatever the tag is now
    assert effc("check", "r.effspec", "--cache-dir", other).code == 0


@pytest.mark.parametrize("odd", ["a link", "a submodule"])
def test_links_and_submodules_of_a_repository_are_refused_as_those_of_a_folder(effc, tmp_path, monkeypatch, odd):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    theirs = package(tmp_path / "repository")
    git = ("git", "-C", theirs, "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    if odd == "a link":
        (theirs / "data").mkdir(exist_ok=True)
        (theirs / "data" / "other.txt").symlink_to("/etc/passwd")
        subprocess.run([*git, "add", "."], check=True)
    else:
        entry = f"160000,{'1' * 40},data/other"
        subprocess.run([*git, "update-index", "--add", "--cacheinfo", entry], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    run = effc("add", f"file://{theirs}")
    assert run.code != 0 and f"is {odd}" in run.err and "data/other" in run.err
    assert not (tmp_path / "effspec.lock").exists()


@pytest.mark.parametrize("source", ["http://127.0.0.1:1/e.git", "ext::sh -c id", "no/such/folder"])
def test_what_is_neither_a_folder_nor_an_address_is_said_to_be_neither(effc, source):
    run = effc("add", source)
    assert run.code == 2 and f"error[unknown-source]: `{source}` is no folder" in run.err


def test_a_repository_of_a_dozen_objects_that_stand_for_many_files_is_refused_at_once(effc, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    theirs = package(tmp_path / "repository")

    def git(*args, given=None):
        command = ["git", "-C", theirs, "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, input=given).stdout.strip()

    git("init", "-q")
    tree = git("hash-object", "-w", "--stdin", given="a")
    for depth in range(10):
        kind = "040000 tree" if depth else "100644 blob"
        tree = git("mktree", given="".join(f"{kind} {tree}\t{name}.txt\n" for name in "abcdefghij"))
    git("update-ref", "HEAD", git("commit-tree", tree, "-m", "bomb"))
    started = time.monotonic()
    run = effc("add", f"file://{theirs}")
    assert run.code == 5 and "has more than 2000 files" in run.err and time.monotonic() - started < 20


def test_a_password_in_an_address_does_not_get_into_a_lock(effc):
    run = effc("add", "https://me:secret@127.0.0.1:9/x.git")
    assert run.code == 2 and "the address holds a password" in run.err and not os.path.exists("effspec.lock")


@pytest.mark.parametrize("verb", ["add", "update", "vendor"])
@pytest.mark.parametrize("facts", ["", 'source = ""\ntree = "a"\n', 'tree = "../x"\nsource = "nowhere"\n'])
def test_a_lock_that_lacks_what_a_package_is_found_by_is_a_diagnostic(effc, verb, facts):
    with open("effspec.lock", "w") as file:
        file.write(f"format = 1\n[packages.edge]\n{facts}")
    run = effc(verb)
    assert run.code in (2, 5) and "error[" in run.err and "internal" not in run.err
