"""Checks rendered objects without a cluster: against KubeRay's CRDs, the core schemas, and the operator's own rules.

Owns the reading of the CRD files and the adjustments that make their schemas usable by a JSON Schema validator. It
refuses what it has no schema for: a document of an unknown kind is a problem, not a pass. Admission webhooks, RBAC and
scheduling are beyond it.

Needs `jsonschema` and `kubernetes-validate` (the `dev` extra).
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_service.errors import ConfigError
from k8s.rules import operator_rules

__all__ = ["CRD_VARIABLE", "KUBERNETES_VERSION", "Problem", "find_crd_folder", "load_documents", "validate"]

CRD_VARIABLE = "STORMJIB_KUBERAY_CRDS"
"""Environment variable that names the folder with KubeRay's CRD files."""
KUBERNETES_VERSION = "1.34"
"""Version of the core schemas that documents are checked against."""

_CRD_FOLDER = "kuberay-crds"
_MAX_PROBLEMS = 50

Document = dict[str, Any]
Schema = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one document."""

    document: str
    """`Kind/name`."""
    path: str
    """Dotted path of the field, empty for the document itself."""
    message: str
    """What is wrong."""

    def __str__(self) -> str:
        return f"{self.document}: {self.path}: {self.message}" if self.path else f"{self.document}: {self.message}"


def validate(documents: list[Document], crd_folder: Path) -> list[Problem]:
    """What is wrong with the documents; an empty list means nothing was found.

    Args:
        documents: rendered or loaded objects.
        crd_folder: folder with `ray.io_rayclusters.yaml` and its siblings of KubeRay v1.7.

    Raises:
        ConfigError: the folder holds no CRD files, or a package of the `dev` extra is missing.
    """
    schemas = _crd_schemas(crd_folder)
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()
    for index, document in enumerate(documents):
        kind, name = str(document.get("kind")), str((document.get("metadata") or {}).get("name", f"#{index}"))
        label = f"{kind}/{name}"
        if (kind, name) in seen:
            problems.append(Problem(label, "metadata.name", "a document of this kind and name came before"))
        seen.add((kind, name))
        group, _, api_version = str(document.get("apiVersion")).rpartition("/")
        if group == "ray.io":
            found = list(_custom_resource(document, label, schemas, api_version))
            problems.extend(found)
            if not found:
                problems.extend(Problem(label, path, message) for path, message in operator_rules(document))
        else:
            problems.extend(_core_document(document, label))
    return problems


def load_documents(text: str) -> list[Document]:
    """The documents of a YAML stream. Raises ConfigError when it is not YAML or a mapping repeats a key."""
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            _refuse_duplicates(node)
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as cause:
        raise ConfigError(f"not valid YAML: {cause}") from cause
    for document in documents:
        if not isinstance(document, dict):
            raise ConfigError(f"a Kubernetes document is a mapping, and one is a {type(document).__name__}.")
    return documents


def find_crd_folder(repository: Path) -> Path | None:
    """The CRD folder: `STORMJIB_KUBERAY_CRDS`, or `shared/kuberay-crds` beside the repository; None without either.

    Raises:
        ConfigError: the variable names a folder without CRD files.
    """
    named = os.environ.get(CRD_VARIABLE)
    if named:
        if not any(Path(named).glob("ray.io_*.yaml")):
            raise ConfigError(
                f"{CRD_VARIABLE}={named}: no ray.io_*.yaml there. docs/kubernetes.md tells how to get the files."
            )
        return Path(named)
    beside = repository.parent / "shared" / _CRD_FOLDER
    return beside if beside.is_dir() else None


def _custom_resource(
    document: Document, label: str, schemas: dict[tuple[str, str], Schema], api_version: str
) -> Iterator[Problem]:
    kind = str(document["kind"]) if "kind" in document else ""
    if (kind, api_version) not in schemas:
        known = ", ".join(sorted(f"ray.io/{version} {name}" for name, version in schemas))
        yield Problem(label, "apiVersion", f"ray.io/{api_version} {kind} is none of the CRDs here: {known}")
        return
    import jsonschema

    validator = jsonschema.Draft202012Validator(schemas[kind, api_version])
    for _, error in zip(range(_MAX_PROBLEMS), validator.iter_errors(document), strict=False):
        yield Problem(label, ".".join(map(str, error.absolute_path)), error.message[:300])


def _core_document(document: Document, label: str) -> Iterator[Problem]:
    try:
        import kubernetes_validate
    except ImportError as cause:
        raise ConfigError("checking core objects needs kubernetes-validate: pip install 'stormjib[dev]'.") from cause
    if "apiVersion" not in document or "kind" not in document:
        yield Problem(label, "", "apiVersion and kind are required")
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield Problem(label, ".".join(map(str, error.absolute_path)), str(error.message)[:300])
    except kubernetes_validate.SchemaNotFoundError as error:
        yield Problem(label, "apiVersion", error.message)


@functools.lru_cache(maxsize=4)
def _crd_schemas(folder: Path) -> dict[tuple[str, str], Schema]:
    """(kind, version) → strict schema, for every served version of every CRD file of the folder."""
    files = sorted(folder.glob("ray.io_*.yaml"))
    if not files:
        raise ConfigError(f"{folder}: no ray.io_*.yaml there. docs/kubernetes.md tells how to get the files.")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    schemas: dict[tuple[str, str], Schema] = {}
    for file in files:
        definition = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)["spec"]  # noqa: S506 (a safe loader)
        for version in definition["versions"]:
            if version["served"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string"},
                        "namespace": {"type": "string"},
                        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                    "additionalProperties": False,
                }
                schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
                schemas[definition["names"]["kind"], version["name"]] = schema
    return schemas


def _strict(schema: Schema) -> Schema:
    """A structural schema as JSON Schema that refuses unknown fields.

    A field with a default is not required, because the API server fills it in first. `metadata` of an embedded
    template is a bare object in the CRDs (the server knows its type) and stays open.
    """
    result = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "default"}
    properties = schema.get("properties")
    if properties is not None:
        result["properties"] = {name: _strict(inner) for name, inner in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
        required = [name for name in schema.get("required", ()) if "default" not in properties.get(name, {})]
        result.pop("required", None)
        if required:
            result["required"] = required
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = _strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if result.pop("nullable", False) and "type" in result:
        kinds = result["type"] if isinstance(result["type"], list) else [result["type"]]
        result["type"] = [*kinds, "null"]
    return result


def _refuse_duplicates(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: {key.value} appears twice. Remove one.")
            seen.add(key.value)
            _refuse_duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item)
