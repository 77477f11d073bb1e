"""Names of models on the Hugging Face Hub: ORG/NAME, or ORG/NAME@REVISION."""

from pathlib import Path


def is_hub_id(base: str) -> bool:
    """Whether a base's name is one of the hub, and not that of a file or directory."""
    if Path(base).expanduser().exists() or base.startswith((".", "/", "~")) or base.endswith(".gguf"):
        return False
    return base.partition("@")[0].count("/") == 1 and "://" not in base


def hub_parts(hub_id: str) -> tuple[str, str | None]:
    """ORG/NAME, and the revision (a tag, branch or commit) if the id names one."""
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def name_of_base(base: str) -> str:
    """What a base is called: a hub id, or the last part of a place; of a run's export, the run."""
    if is_hub_id(base):
        return base
    *above, name = base.rstrip("/").split("/")
    return above[-1] if name == "export" and above and above[-1].strip(".~") else name
