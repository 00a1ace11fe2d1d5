"""The one error tree: what can go wrong, said once, for HTTP, the CLI and the log alike.

Every error a user can meet is a LatentdError. `slug` is the stable `code` of the problem document, `hint` says what to do next.
"""

from __future__ import annotations

from typing import ClassVar, Optional


class LatentdError(Exception):
    """Base of every expected failure; carries all that an RFC 9457 problem document needs.

    `detail` is this occurrence in plain words; `hint` (class default, or per occurrence) tells the reader the next step;
    `retry_after_s` is sent as Retry-After where waiting helps.
    """

    slug: ClassVar[str] = "internal-error"
    http_status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    default_hint: ClassVar[str] = "This is a bug in latentd: please report it with the log lines of this request."

    def __init__(self, detail: str = "", *, hint: Optional[str] = None, retry_after_s: Optional[int] = None) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.hint = hint if hint is not None else self.default_hint
        self.retry_after_s = retry_after_s


# --- requests ---------------------------------------------------------------------------------------------------------


class BadRequest(LatentdError):
    slug, http_status, title = "bad-request", 400, "The request is malformed"
    default_hint = "Compare the request with /docs."


class Forbidden(LatentdError):
    slug, http_status, title = "forbidden", 403, "Not allowed"
    default_hint = "Call latentd by the address it listens on, from a program on this device or from its own page."


class NotFound(LatentdError):
    slug, http_status, title = "not-found", 404, "There is nothing at this address"
    default_hint = "See /docs for the addresses that exist."


class SampleNotFound(NotFound):
    slug, title = "sample-not-found", "There is no such sample"
    default_hint = "GET /v1/samples lists what was taught."


class ClassNotFound(NotFound):
    slug, title = "class-not-found", "There is no such class"
    default_hint = "GET /v1/classes lists the classes."


class MethodNotAllowed(LatentdError):
    slug, http_status, title = "method-not-allowed", 405, "This address does not take that method"
    default_hint = "The Allow header of this answer lists the methods."


class NotAcceptable(LatentdError):
    slug, http_status, title = "not-acceptable", 406, "No such representation"
    default_hint = "Ask for application/json, application/x-npy or application/x-safetensors."


class RequestTimeout(LatentdError):
    slug, http_status, title = "request-timeout", 408, "The request body came too slowly"
    default_hint = "Send it again over a faster connection, or in smaller requests."


class Conflict(LatentdError):
    slug, http_status, title = "conflict", 409, "The request conflicts with what is stored"
    default_hint = "Read the current state, then try again."


class TooLarge(LatentdError):
    slug, http_status, title = "too-large", 413, "The request is larger than this device accepts"
    default_hint = "GET /v1/info shows the limits; send fewer or smaller images."


class UnsupportedMedia(LatentdError):
    slug, http_status, title = "unsupported-media-type", 415, "This kind of content is not accepted"
    default_hint = "Send JPEG, PNG, WebP or BMP bytes, multipart/form-data with image fields, or JSON with base64 images."


class Unprocessable(LatentdError):
    slug, http_status, title = "unprocessable", 422, "The request can't be processed"
    default_hint = "See the detail."


class ImageUndecodable(Unprocessable):
    slug, title = "image-undecodable", "The image can't be decoded"
    default_hint = "Open the file in a viewer; if it looks right there, save it again as JPEG or PNG."


class LatentNotFinite(Unprocessable):
    slug, title = "latent-not-finite", "The frozen stage gave no usable numbers for the image"
    default_hint = "Leave this image out; if it happens with many images, restart latentd and read /v1/status."


class LabelInvalid(Unprocessable):
    slug, title = "label-invalid", "The label is missing or can't be used"
    default_hint = 'Give each image a label of 1 to 100 characters: a label field, ?label=, or "label" in JSON.'


class IdempotencyKeyReused(Unprocessable):
    slug, title = "idempotency-key-reused", "This Idempotency-Key was used with another body"
    default_hint = "Use a new key for a new request."


class Overloaded(LatentdError):
    slug, http_status, title = "overloaded", 503, "A queue is full"
    default_hint = "Wait for the time in Retry-After, then send it again; nothing was stored."

    def __init__(self, detail: str = "", *, hint: Optional[str] = None, retry_after_s: Optional[int] = 1) -> None:
        super().__init__(detail, hint=hint, retry_after_s=retry_after_s)


class NotReady(Overloaded):
    slug, title = "not-ready", "latentd is not ready yet"
    default_hint = "Wait until /readyz answers 200; /v1/status says what is missing."


class BudgetFull(LatentdError):
    slug, http_status, title = "budget-full", 507, "The storage budget is used up"
    default_hint = "Forget samples or classes, or raise state.journal_bytes."


# --- start-up and the inside ------------------------------------------------------------------------------------------


class ConfigError(LatentdError):
    slug, title = "config-invalid", "The configuration can't be used"
    default_hint = "`latentd config show --origin` prints every key, its value and where it came from."


class StateInUse(LatentdError):
    slug, title = "state-in-use", "Another latentd uses this state folder"
    default_hint = "Stop that one first, or give this one its own folder with --state-dir."


class CheckpointError(LatentdError):
    slug, title = "checkpoint-invalid", "The weights can't be used"
    default_hint = "`latentd backbone pull` fetches the default backbone again."


class LimitsUnreachable(LatentdError):
    slug, title = "limits-unreachable", "Nothing that was measured keeps the limits"
    default_hint = (
        "Loosen the limit that is named, or measure other splits, grids and codecs; fewer backbone.class_tokens need much less memory."
    )


class EngineError(LatentdError):
    slug, http_status, title = "engine-failed", 503, "The inference engine failed"
    default_hint = "/v1/status says which engine serves and why; the log has the cause."


class OutOfMemory(EngineError):
    slug, title = "out-of-memory", "The device has no memory left for this"
    default_hint = "Send fewer images at once, or wait for the time in Retry-After; /v1/status shows what serves and in how small batches."

    def __init__(self, detail: str = "", *, hint: Optional[str] = None, retry_after_s: Optional[int] = 5) -> None:
        super().__init__(detail, hint=hint, retry_after_s=retry_after_s)


class JournalError(LatentdError):
    slug, http_status, title = "journal-failed", 503, "The journal can't be written"
    default_hint = "Check the free space and the permissions of the state folder; classify goes on."


class LearnerError(LatentdError):
    slug, http_status, title = "learner-failed", 503, "The learner stopped"
    default_hint = "Nothing taught is lost; /v1/status says why it stopped. Restart latentd to start it again."


class MeterUnavailable(LatentdError):
    slug, http_status, title = "meter-unavailable", 503, "The energy meter can't be read"
    default_hint = "/v1/energy says which meters were tried and why each can't be read; everything else goes on without."


class InstallError(LatentdError):
    slug, title = "install-failed", "The service can't be installed or removed"
    default_hint = "Mend the cause and run the same command again: what was done already is not done twice."


class Unreachable(LatentdError):
    slug, title = "unreachable", "latentd is not running; start it with `latentd serve`"
    default_hint = "Does it listen somewhere else? Name its address with --url."


class NotLatentd(Unreachable):
    slug, title = "not-latentd", "This is not latentd"


class NoAnswer(Unreachable):
    slug, title = "no-answer", "latentd did not answer"
    default_hint = "`latentd status` says whether it still runs; its log says what it was doing."


class FileUnusable(LatentdError):
    slug, title = "file-unusable", "The file can't be used"
    default_hint = "Check the path and its permissions."
