"""What a client is told when its request cannot be served, in OpenAI's shape."""


class ApiError(Exception):
    """A status of HTTP, and why.

    Attributes:
      status: of HTTP.
      message: what is wrong, and what would be right.
      param: the field that is wrong, if it is one.
      code: of OpenAI's, where they have one for it.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict:
        """The JSON of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}
