"""Which files of posts the words of a command stand for."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from wsl_d2.data.posts.readers import PostsError
from wsl_d2.data.remote import is_url, open_file_system, retry

_NOT_POSTS = ("_stats.json",)  # what img2dataset leaves beside its tars; so it does tables of the same names as them


def find_files(inputs: Iterable[str]) -> dict[str, int]:
    """Returns path -> bytes of all files of posts, in the order of the inputs; those of one input sorted by path.

    Args:
        inputs: files, folders, glob patterns or URLs. Of an output folder of img2dataset the tars alone are posts.

    Raises:
        PostsError: a path matches nothing, or what is no file, such as a pipe, which can be read only once.
    """
    paths: dict[str, int] = {}
    for pattern in inputs:
        try:
            found = retry(partial(_find, pattern), pattern, 4)
        except (FileNotFoundError, PermissionError) as error:
            raise PostsError(f"{error}.") from error
        names = [path for path in found if not path.endswith(_NOT_POSTS)]
        tars = {path.removesuffix(".tar") for path in names if path.endswith(".tar")}
        names = [path for path in names if path.removesuffix(".parquet") not in tars]
        if not names:
            raise PostsError(f"{pattern}: there is no such file.")
        paths |= {path: found[path] for path in sorted(names)}
    return paths


def _find(pattern: str) -> dict[str, int]:
    files = open_file_system(pattern)
    root = files._strip_protocol(pattern)
    found = files.find(root, detail=True) if files.isdir(root) else files.glob(root, detail=True)
    if not found and files.exists(root):
        found = {root: files.info(root)}
    if others := [path for path, row in found.items() if row["type"] == "other"]:
        raise PostsError(f"{others[0]} is a pipe or device, and posts are read more than once; give a file.")
    return {files.unstrip_protocol(path) if is_url(pattern) else path: int(row["size"]) for path, row in found.items()}
