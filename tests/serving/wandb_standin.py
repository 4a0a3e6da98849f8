"""A small server that answers the W&B client as W&B does: GraphQL, manifests, files.

Queries are parsed, validated and executed against the part of W&B's schema that artifacts need, so
a query that W&B would refuse is refused here too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

from graphql import build_schema, graphql_sync

SCHEMA = """
scalar JSON
scalar JSONString
scalar DateTime
scalar Int64

type Query {
  viewer: User
  serverInfo: ServerInfo
  project(name: String, entityName: String): Project
  artifact(id: ID!): Artifact
}
type User {
  id: ID! entity: String username: String email: String flags: JSONString
  teams: EntityConnection
}
type EntityConnection { edges: [EntityEdge!]! }
type EntityEdge { node: Entity }
type Entity { id: ID! name: String! }
type ServerInfo { features: [ServerFeature] }
type ServerFeature { name: String! isEnabled: Boolean! }
type Project {
  id: ID! internalId: ID! name: String! entityName: String! entity: Entity!
  artifactCollectionMembership(name: String!): ArtifactCollectionMembership
  artifactCollection(name: String!): ArtifactCollection
  artifact(name: String!, enableTracking: Boolean): Artifact
}
interface ArtifactCollection {
  id: ID! name: String! project: Project
  artifactMembership(aliasName: String!): ArtifactCollectionMembership
}
type ArtifactSequence implements ArtifactCollection {
  id: ID! name: String! project: Project
  artifactMembership(aliasName: String!): ArtifactCollectionMembership
}
type ArtifactCollectionMembership {
  id: ID! versionIndex: Int createdAt: DateTime aliases: [ArtifactAlias!]!
  artifactCollection: ArtifactCollection artifact: Artifact
  files(names: [String!], after: String, first: Int): FileConnection
}
type ArtifactAlias { id: ID! alias: String! artifactCollection: ArtifactCollection }
type ArtifactType { id: ID! name: String! }
type Tag { id: ID! name: String! }
enum ArtifactState { PENDING COMMITTED DELETED }
type Artifact {
  id: ID! artifactSequence: ArtifactSequence! versionIndex: Int artifactType: ArtifactType!
  description: String metadata: JSONString ttlDurationSeconds: Int64! ttlIsInherited: Boolean!
  tags: [Tag!] historyStep: Int64 state: ArtifactState! size: Int64! digest: String!
  digestAlgorithm: String commitHash: String fileCount: Int64 createdAt: DateTime
  updatedAt: DateTime aliases: [ArtifactAlias!]! currentManifest: ArtifactManifest
  files(names: [String!], after: String, first: Int): FileConnection
}
type ArtifactManifest { id: ID! file: File! }
type FileConnection { pageInfo: PageInfo! edges: [FileEdge!]! totalCount: Int }
type PageInfo { endCursor: String hasNextPage: Boolean! }
type FileEdge { node: File }
type File {
  id: ID! name: String! displayName: String url: String sizeBytes: Int64 storagePath: String
  mimetype: String updatedAt: DateTime digest: String md5: String directUrl: String!
}
"""


@dataclass
class Version:
    """One version of an artifact: files it holds, and files it refers to."""

    files: dict[str, bytes] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass
class StandIn:
    """The server.

    Attributes:
        entity: The only entity.
        project: Its only project.
        artifacts: Versions by artifact.
        key: The only API key.
        asked: Names of the GraphQL operations, and paths of files, as they were asked for.
        spoil: Paths of files that arrive with another content.
    """

    artifacts: dict[str, list[Version]]
    entity: str = "team"
    project: str = "evals"
    key: str = "k" * 40
    asked: list[str] = field(default_factory=list)
    spoil: set[str] = field(default_factory=set)

    def __enter__(self) -> StandIn:
        standin = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path != "/graphql":
                    self.answer(404, b"{}")
                    return
                word = base64.b64encode(f"api:{standin.key}".encode()).decode()
                if self.headers.get("Authorization") != f"Basic {word}":
                    self.answer(401, b'{"errors": [{"message": "user is not logged in"}]}')
                    return
                self.answer(200, json.dumps(standin.execute(json.loads(body))).encode())

            def do_GET(self) -> None:
                content = standin.content(unquote(self.path))
                self.answer(404 if content is None else 200, content or b"")

            def answer(self, code: int, content: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.schema = build_schema(SCHEMA)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def execute(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request."""
        self.asked.append(request.get("operationName") or request["query"].split("(")[0].strip())
        result = graphql_sync(
            self.schema,
            request["query"],
            self.root(),
            variable_values=request.get("variables"),
            operation_name=request.get("operationName") or None,
            type_resolver=lambda *_: "ArtifactSequence",
        )
        return dict(result.formatted)

    def root(self) -> dict[str, Any]:
        user = {"id": "u1", "entity": self.entity, "username": self.entity, "flags": "{}"}
        return {
            "viewer": {**user, "email": "a@b.c", "teams": {"edges": []}},
            "serverInfo": {"features": []},
            "project": self._project,
            "artifact": lambda info, id: self._artifact(*id.split(":")),
        }

    def content(self, path: str) -> bytes | None:
        """Return what lies at a URL: a manifest, or a file."""
        self.asked.append(path)
        kind, name, index, *rest = path.strip("/").split("/")
        version = self.artifacts[name][int(index)]
        if kind == "manifest":
            return json.dumps(_manifest(version)).encode()
        wanted = "/".join(rest)
        if wanted in self.spoil:
            return b"spoilt"
        return version.files.get(wanted)

    def _project(self, info: Any, name: str, entityName: str) -> dict[str, Any] | None:
        if (entityName, name) != (self.entity, self.project):
            return None
        return {
            **self._names(),
            "artifactCollectionMembership": lambda info, name: self._membership(*_split(name)),
            "artifact": lambda info, name, enableTracking=None: self._of(*_split(name)),
            "artifactCollection": lambda info, name: (
                self._collection(name) if name in self.artifacts else None
            ),
        }

    def _names(self) -> dict[str, Any]:
        entity = {"id": "e1", "name": self.entity}
        names = {"name": self.project, "entityName": self.entity, "entity": entity}
        return {"id": "p1", "internalId": "p1", **names}

    def _collection(self, name: str) -> dict[str, Any]:
        return {
            "id": f"c-{name}",
            "name": name,
            "project": self._names(),
            "artifactMembership": lambda info, aliasName: self._membership(name, aliasName),
        }

    def _index(self, name: str, version: str) -> int | None:
        versions = self.artifacts.get(name, [])
        if version == "latest":
            return len(versions) - 1 if versions else None
        for index, known in enumerate(versions):
            if version == f"v{index}" or version in known.aliases:
                return index
        return None

    def _membership(self, name: str, version: str) -> dict[str, Any] | None:
        index = self._index(name, version)
        if index is None:
            return None
        return {
            "id": f"m-{name}-{index}",
            "versionIndex": index,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": self._aliases(name, index),
            "artifactCollection": self._collection(name),
            "artifact": self._artifact(name, str(index)),
            "files": lambda info, **page: self._files(name, index),
        }

    def _of(self, name: str, version: str) -> dict[str, Any] | None:
        index = self._index(name, version)
        return None if index is None else self._artifact(name, str(index))

    def _aliases(self, name: str, index: int) -> list[dict[str, Any]]:
        words = [f"v{index}", *self.artifacts[name][index].aliases]
        return [
            {"id": f"{name}:{w}", "alias": w, "artifactCollection": self._collection(name)}
            for w in words
        ]

    def _artifact(self, name: str, number: str) -> dict[str, Any]:
        index, version = int(number), self.artifacts[name][int(number)]
        manifest = {"directUrl": f"{self.url}/manifest/{quote(name)}/{index}"}
        return {
            "id": f"{name}:{index}",
            "artifactSequence": self._collection(name),
            "versionIndex": index,
            "artifactType": {"id": "t", "name": "model"},
            "metadata": json.dumps(version.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "state": "COMMITTED",
            "size": sum(map(len, version.files.values())),
            "digest": hashlib.md5(json.dumps(_manifest(version)).encode()).hexdigest(),
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": "c",
            "fileCount": len(version.files) + len(version.references),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
            "aliases": self._aliases(name, index),
            "currentManifest": {"id": "m", "file": {"id": "f", "name": "m", **manifest}},
            "files": lambda info, **page: self._files(name, index),
        }

    def _files(self, name: str, index: int) -> dict[str, Any]:
        base = f"{self.url}/files/{quote(name)}/{index}"
        nodes = [
            {
                "id": path,
                "name": path,
                "displayName": path,
                "sizeBytes": len(content),
                "md5": _md5(content),
                "digest": _md5(content),
                "directUrl": f"{base}/{quote(path)}",
            }
            for path, content in self.artifacts[name][index].files.items()
        ]
        page = {"endCursor": None, "hasNextPage": False}
        return {"pageInfo": page, "edges": [{"node": n} for n in nodes], "totalCount": len(nodes)}


def _split(name: str) -> tuple[str, str]:
    short, _, version = name.partition(":")
    return short, version or "latest"


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


def _manifest(version: Version) -> dict[str, Any]:
    contents: dict[str, Any] = {
        path: {"digest": _md5(content), "size": len(content), "birthArtifactID": "x"}
        for path, content in version.files.items()
    }
    for path, ref in version.references.items():
        contents[path] = {"digest": _md5(ref.encode()), "ref": ref, "size": 1}
    return {
        "version": 1,
        "storagePolicy": "wandb-storage-policy-v1",
        "storagePolicyConfig": {"storageLayout": "V2"},
        "contents": contents,
    }
