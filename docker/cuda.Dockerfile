# An image with lift_ray for nodes with NVIDIA GPUs; it also runs on nodes without. PyTorch's wheels contain CUDA's libraries.
#     docker build -f docker/cuda.Dockerfile -t REGISTRY/lift_ray:0.1.0-cuda .
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY lift_ray lift_ray
COPY search_spaces search_spaces
COPY clusters clusters
RUN pip install --no-cache-dir 'hatchling>=1.26' && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# Python 3.12. rsync and ssh are for `ray up`: it copies files into the container, and the head starts the workers over SSH.
RUN apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends \
        ca-certificates ffmpeg openssh-client python3 python3-venv rsync && \
    rm -rf /var/lib/apt/lists/*
# `ray up` mounts the token of the host, which its owner alone reads, at HOME of the image: UID is `id -u` of ssh_user there.
# Ubuntu's image has a user with 1000 already.
ARG UID=1000
# A login shell, which `ray up` and KubeRay may use, sets PATH anew; profile.d adds the environment again.
RUN if id ubuntu > /dev/null 2>&1; then userdel ubuntu; fi && \
    useradd --create-home --shell /bin/bash --uid $UID lift && \
    install -d -o lift -g lift -m 700 /home/lift/.ray && \
    echo 'export PATH=/opt/lift/bin:$PATH' > /etc/profile.d/lift.sh && \
    python3 -m venv /opt/lift && chown -R lift:lift /opt/lift
USER lift
WORKDIR /home/lift
ENV HOME=/home/lift PATH=/opt/lift/bin:$PATH
COPY docker/constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
# The extra for your bucket (s3, gcs, azure), and what the head of a cloud starts workers with (boto3 for AWS; see clusters/).
ARG EXTRAS=s3,search,serve
ARG PACKAGES=boto3
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt "$(echo /tmp/wheels/*.whl)[$EXTRAS]" $PACKAGES && \
    python -m lift_ray.ray_runtime.patches
# No ENTRYPOINT: `ray up` and KubeRay run `ray start` through a shell.
CMD ["bash"]
