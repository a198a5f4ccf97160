# The runtime alone: Check-in, engines on the CPU, the server and its page. No torch, no diffusers, no checkpoints.
#   docker build -t personalq .
#   docker run --read-only --tmpfs /tmp -p 8765:8765 -v ~/checkpoints:/repository personalq
# EXTRAS: cpu (ONNX Runtime), or cpu,openvino for the faster engine (docs/server.md has the sizes).
FROM python:3.12-slim AS build
ARG EXTRAS=cpu
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE cli.py ./
COPY personalq personalq
COPY runtime runtime
COPY fleet fleet
# The other rooms are named in pyproject.toml; a server has only their names.
RUN python -c "import pathlib, tomllib; \
        names = tomllib.load(open('pyproject.toml', 'rb'))['tool']['setuptools']['packages']; \
        files = [pathlib.Path(*name.split('.'), '__init__.py') for name in names]; \
        [(file.parent.mkdir(parents=True, exist_ok=True), file.touch()) for file in files]" \
    && python -m venv /opt/personalq \
    && /opt/personalq/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS},serve]" \
    && /opt/personalq/bin/pip uninstall -y pip \
    && find /opt/personalq -name __pycache__ -type d -prune -exec rm -r {} +

FROM python:3.12-slim
COPY --from=build /opt/personalq /opt/personalq
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin personalq && mkdir /repository \
    && chown personalq /repository
USER personalq
ENV PATH=/opt/personalq/bin:$PATH PERSONALQ_REPO=/repository PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
VOLUME /repository
EXPOSE 8765
HEALTHCHECK --interval=15s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8765/readyz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["personalq"]
CMD ["serve", "--host", "0.0.0.0"]
