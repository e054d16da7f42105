"""`ppg-fast merge` and `ppg-fast push`."""

from typing import Any

from ppg_fast.cli.common import lacks


def add(commands: Any) -> None:
    merge = commands.add_parser("merge", help="merge the LoRA adapter of a run into its base model")
    merge.add_argument(
        "source", metavar="RUN_OR_ADAPTER", help="folder of a run, or of an adapter (adapter_config.json)"
    )
    merge.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="new folder for the whole model and its tokenizer"
    )
    merge.add_argument("--base", metavar="MODEL", help="folder of the base model [the one that the adapter names]")
    merge.add_argument(
        "--push-to-hub", metavar="REPO", help="upload it to this Hugging Face repository (user/name) too"
    )
    push = commands.add_parser("push", help="upload a trained model with its model card to the Hugging Face Hub")
    push.add_argument(
        "source", metavar="RUN_OR_MODEL", help="folder of a run (its checkpoint/ is taken), of a model or of an adapter"
    )
    push.add_argument("repository", metavar="REPO", help="user/name; made if it does not exist")
    for command in (merge, push):
        command.add_argument(
            "--private", action="store_true", help="make the repository private where it does not exist yet"
        )


def merge(arguments: dict[str, Any]) -> int:
    return _export("merge", arguments)


def push(arguments: dict[str, Any]) -> int:
    return _export("push", arguments)


def _export(command: str, arguments: dict[str, Any]) -> int:
    if lacks(command, ("transformers", "huggingface_hub")):
        return 1
    from ppg_fast.models import export

    folder, repository = arguments["source"], arguments.get("repository") or arguments.get("push_to_hub")
    if repository:
        export.require_repository(repository)
    if command == "merge":
        folder = str(export.merge_adapter(folder, arguments["output"], arguments["base"]))
        print(f"merged: {folder}")
    if repository:
        print(f"pushed: {export.push_to_hub(folder, repository, arguments['private'])}")
    return 0
