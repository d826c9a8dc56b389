"""Tokens: a cluster of Ray may ask whoever joins it for one.

Ray makes one, and asks for it, with the first cluster that a process starts for itself; and `ray start --head` asks for
it as soon as its user has one. But Ray shows it to no cluster that is named by its address, unless it is told to
(RAY_AUTH_MODE). So the cluster is asked first whether it wants one.
"""

import os
from pathlib import Path

from dept_ray.errors import ClusterError

_MODE = "RAY_AUTH_MODE"
_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""What every cluster answers, and nothing depends on."""
REMEDY = (
    "copy the head's ~/.ray/auth_token (`ray get-auth-token` prints it there) to this machine's, or put it into "
    f"RAY_AUTH_TOKEN, and leave {_MODE} unset or set it to token"
)


def own_token() -> str | None:
    """The token that Ray's own tools would use, in their order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.expanduser().read_text().strip() or None
    except OSError:
        return None


def show_token(address: str, timeout_s: float) -> None:
    """Let this process, and all that it starts, show its token to the cluster at HOST:PORT, where that asks for one.

    RAY_AUTH_MODE decides, if it is set.

    Raises:
        ClusterError: it asks for one, and there is none here, or another one.
    """
    if _MODE in os.environ or _lets_in(address, None, timeout_s):
        return
    token = own_token()
    if token is None or not _lets_in(address, token, timeout_s):
        what = "asks for its token, and there is none here" if token is None else "asks for another token than ours"
        raise ClusterError(f"the Ray cluster at address {address!r} {what}: {REMEDY}")
    os.environ[_MODE] = "token"
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")  # Ray reads its environment once, as it is loaded


def _lets_in(address: str, token: str | None, timeout_s: float) -> bool:
    """Whether a cluster answers; yes, too, where it does not speak with us so (over TLS, say), which Ray will tell."""
    import grpc

    shown = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(_QUESTION)
        try:
            ask(b"", timeout=timeout_s, metadata=shown)
        except grpc.RpcError as err:
            return err.code() != grpc.StatusCode.UNAUTHENTICATED  # pyright: ignore[reportAttributeAccessIssue]
    return True
