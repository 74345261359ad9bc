"""`python tests/gcs_emulator.py PORT`: gcp-storage-emulator, with what it lacks and TensorStore relies on.

Of an object's content it says no generation, and it ignores on which generation a request depends:
https://cloud.google.com/storage/docs/request-preconditions.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

GENERATION = "x-goog-generation"


def conditional(handler, name_of):
    """The handler of a request, where the object has the generation that the request names, or not the one."""

    def handle(request, response, storage, *args, **kwargs):
        def generation():
            try:
                return storage.get_file_obj(request.params["bucket_name"], name_of(request))["generation"]
            except NotFound:
                return "0"

        before = generation()
        wanted, unwanted = (
            request.query.get(name, [None])[0] for name in ("ifGenerationMatch", "ifGenerationNotMatch")
        )
        if wanted not in (None, before):
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif unwanted == before != "0":
            response.status = HTTPStatus.NOT_MODIFIED
            response[GENERATION] = before
        else:
            handler(request, response, storage, *args, **kwargs)
            if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                response[GENERATION] = generation()

    return handle


def _uploaded(request):
    return request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]


def main(port):
    objects.get = conditional(objects.get, lambda request: request.params["object_id"])
    objects.delete = conditional(objects.delete, lambda request: request.params["object_id"])
    objects.insert = conditional(objects.insert, _uploaded)
    from gcp_storage_emulator import server  # it takes the handlers as they are by now

    server.create_server("localhost", port, in_memory=True, default_bucket="pod").run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
