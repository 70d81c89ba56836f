"""What comes with blemish: signatures over a run, the bill of materials, images of containers, and the lower ends of the ranges."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import CONFIGS

ROOT = CONFIGS.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def program(name: str) -> str:
    """A program of this environment, or of the machine; skips where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"no {name} here: pip install 'blemish[dev]'")


def test_a_signed_run_is_as_it_was(tmp_path):
    """A change, an addition and a removal in a run folder are found, and so is another key."""
    for package in ("OpenSSL", "model_signing"):
        pytest.importorskip(package, reason="no model-signing here: pip install 'blemish[sign]'")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing import signing, verifying

    run, signature, keys = tmp_path / "run", tmp_path / "run.sig", []
    (run / "images").mkdir(parents=True)
    for name in ("model.ckpt", "config.yaml", "record.json", "images/a.png"):
        (run / name).write_bytes(name.encode())
    for name in ("mine", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (tmp_path / name).write_bytes(key.private_bytes(*form))
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        keys.append(tmp_path / f"{name}.pub")
        keys[-1].write_bytes(public)
    signing.Config().use_elliptic_key_signer(private_key=tmp_path / "mine").sign(run, signature)

    def is_signed(key: Path) -> bool:
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=key).verify(run, signature)
        except Exception:
            return False
        return True

    assert is_signed(keys[0]) and not is_signed(keys[1])
    for change in (lambda: (run / "model.ckpt").write_bytes(b"another"), lambda: (run / "more").touch(), (run / "config.yaml").unlink):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        change()
        assert not is_signed(keys[0])
        for path in [path for path in run.rglob("*") if path.is_file() and path not in before]:
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
        assert is_signed(keys[0])


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_dockerfiles(path):
    """Linted, and all that they copy is there and sent."""
    text, sent = path.read_text(), re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists()
        assert source == "." or any(source == name or source.startswith(f"{name}/") for name in sent), source
    for group in re.findall(r"--group \S+:(\w+)", text):
        assert group in PROJECT["dependency-groups"]
    done = subprocess.run([program("hadolint"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_wheel_needs_is_sent():
    """The image for training builds the wheel from what .dockerignore lets through."""
    sent = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {"pyproject.toml", "src", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], *included} == set(sent)


def test_the_group_of_a_device_has_the_ranges_of_the_project():
    groups, project = PROJECT["dependency-groups"], PROJECT["project"]
    ranges = {*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)}
    assert set(groups["edge"]) <= ranges and set(groups["wheel"]) <= ranges


@pytest.mark.slow
def test_the_lower_ends_of_the_ranges_fit_together():
    """The oldest versions that the ranges allow can be installed together on two versions of Python."""
    uv, oldest = program("uv"), re.search(r"3\.\d+", PROJECT["project"]["requires-python"])[0]
    for python in (oldest, "3.12"):
        versions = ["--resolution", "lowest-direct", "--python-version", python, "--no-python-downloads"]
        command = [uv, "pip", "compile", *versions, "--extra", "export", "--extra", "watch", ROOT / "pyproject.toml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode and "dns error" in done.stderr:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, f"Python {python}: {done.stderr}"


@pytest.mark.slow
def test_the_bill_of_materials(tmp_path):
    """It names what is installed, with versions and licences."""
    folder, content = Path(sys.executable).parent, tmp_path / "sbom.json"
    if not (folder / "cyclonedx-py").exists():
        pytest.skip("no cyclonedx-py here: pip install 'blemish[dev]'")
    command = ["make", "sbom", f"BIN={folder}", f"SBOM={content}", "-o", f"{folder.parent}/installed-dev", "-o", ".venv/installed-dev"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(content.read_text())
    assert found["bomFormat"] == "CycloneDX" and found["metadata"]["component"]["name"] == "blemish"
    components = {component["name"].lower(): component for component in found["components"]}
    assert {"torch", "numpy", "lightning"} <= components.keys() and components["numpy"]["version"] and components["numpy"]["licenses"]
