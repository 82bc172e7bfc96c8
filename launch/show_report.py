"""Write a run's self-contained report and print its path.

python launch/show_report.py runs/quickstart
python launch/show_report.py runs/quickstart --serve 8000     # a fresh report at every reload, on this machine only
"""

import argparse
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from shodh.command_line import run
from shodh.config import ConfigError


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Write a run's self-contained report.html and print its path.")
    parser.add_argument("run_folder", type=Path, help="folder that a run wrote, for example runs/quickstart")
    parser.add_argument("--serve", type=int, metavar="PORT", help="also serve it on 127.0.0.1, anew at every reload")
    options = parser.parse_args(arguments)
    from shodh.evaluation.report import write_report  # after parsing, because matplotlib takes half a second

    print(write_report(options.run_folder), flush=True)
    if options.serve is not None:
        serve_report(options.run_folder, options.serve)


def serve_report(run_folder: Path, port: int) -> None:
    """Answer requests from this machine with a freshly written report until interrupted."""
    from shodh.evaluation.report import write_report

    class ReportHandler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rsplit(":", 1)[0]
            if self.path != "/" or host not in ("127.0.0.1", "localhost"):  # another host name: a page elsewhere asks
                self.send_error(404)
                return
            page = write_report(run_folder).read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the terminal may belong to a training run."""

    try:
        server = HTTPServer(("127.0.0.1", port), ReportHandler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--serve={port}: cannot listen there ({error}). Choose another port above 1024.") from None
    with server:
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    run(main)
