"""JSON schemas for cluster files: Ray's own for `ray up`, and those of the parts that Ray's leaves open.

`ray-schema.json` accepts any mapping as `provider` keys and `node_config`, and Ray has no schema for KubeRay's files. A typo there
is found only by the cloud, so those parts are listed here, from botocore and Ray's Azure template where they have the list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}


def mapping(required: str, /, **properties: Schema) -> Schema:
    """Return the schema of a mapping with these keys and no others; `required` names the required ones."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def listed(items: Schema) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def anything(names: str) -> dict[str, Schema]:
    """Return schemas for keys whose values are not checked."""
    return dict.fromkeys(names.split(), ANY)


def ray_schema() -> Schema:
    """Return Ray's schema of files for `ray up`."""
    import ray.autoscaler

    schema: Schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    schema["properties"]["file_mounts"]["additionalProperties"] = TEXT  # Ray accepts any mapping, and fails later
    return schema


RANGES = listed({"type": "object"})

# Keys of `provider` that Ray 2.60 reads, by provider; a test compares them with its code.
PROVIDERS: dict[str, Schema] = {
    "aws": mapping(
        "type region",
        **anything("availability_zone cloudwatch cache_stopped_nodes use_internal_ips"),
        security_group=mapping(
            "",
            GroupName=TEXT,
            IpPermissions=listed({"type": "object", "properties": {"IpRanges": RANGES, "Ipv6Ranges": RANGES}}),
        ),
        type=TEXT,
        region=TEXT,
        key_pair={"type": "object"},
        aws_credentials=ANY,
    ),
    "gcp": mapping(
        "type project_id region availability_zone",
        **anything("cache_stopped_nodes gcp_credentials use_internal_ips"),
        type=TEXT,
        project_id=TEXT,
        region=TEXT,
        availability_zone=TEXT,
    ),
    "azure": mapping(
        "type subscription_id location resource_group",
        **anything("availability_zone cache_stopped_nodes tags unique_id"),
        **anything("use_internal_ips use_external_head_ip"),
        type=TEXT,
        location=TEXT,
        resource_group=TEXT,
        subscription_id=TEXT,
        subnet_mask=TEXT,
        msi_name=TEXT,
        msi_resource_group=TEXT,
    ),
    "local": mapping(
        "type head_ip worker_ips",
        **anything("external_head_ip use_internal_ips"),
        type=TEXT,
        head_ip=TEXT,
        worker_ips=listed(TEXT) | {"minItems": 1, "uniqueItems": True},
    ),
}

# https://cloud.google.com/compute/docs/reference/rest/v1/instances, without the output-only fields
GCP_MACHINE = mapping(
    "machineType disks",
    **anything("advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection description"),
    **anything("displayDevice hostname instanceEncryptionKey keyRevocationActionType metadata minCpuPlatform name"),
    **anything("networkInterfaces networkPerformanceConfig params privateIpv6GoogleAccess reservationAffinity"),
    **anything("localSsdEncryptionMode resourcePolicies shieldedInstanceConfig shieldedInstanceIntegrityPolicy"),
    **anything("sourceMachineImage sourceMachineImageEncryptionKey tags workloadIdentityConfig"),
    machineType=TEXT,
    labels={"type": "object"},
    disks=listed({"type": "object"}),
    guestAccelerators=listed(
        mapping("acceleratorType acceleratorCount", acceleratorType=TEXT, acceleratorCount=NUMBER)
    ),
    serviceAccounts=listed(mapping("email scopes", email=TEXT, scopes=listed(TEXT))),
    scheduling=mapping(
        "",
        **anything("availabilityDomain exposeHostTopology gracefulShutdown hostErrorTimeoutSeconds locationHint"),
        **anything("localSsdRecoveryTimeout maxRunDuration minNodeCpus nodeAffinities onInstanceStopAction"),
        **anything("preemptionNoticeDuration protectionTier skipGuestOsShutdown terminationTime"),
        automaticRestart=FLAG,
        preemptible=FLAG,
        onHostMaintenance={"enum": ["MIGRATE", "TERMINATE"]},
        instanceTerminationAction={"enum": ["DELETE", "STOP"]},
        provisioningModel={"enum": ["SPOT", "STANDARD", "FLEX_START", "RESERVATION_BOUND"]},
    ),
)


def aws_machine() -> Schema | None:
    """Return the schema of EC2's RunInstances by botocore's model of it; None if botocore is not installed."""
    try:
        from botocore.session import Session  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return None
    schema = _of_shape(Session().get_service_model("ec2").operation_model("RunInstances").input_shape)
    schema["required"] = ["InstanceType", "ImageId"]
    schema["properties"]["SubnetIds"] = listed(TEXT)  # Ray's own key: it picks one of them for each machine
    return schema


TYPES = {
    "structure": "object",
    "list": "array",
    "map": "object",
    "integer": "integer",
    "long": "integer",
    "boolean": "boolean",
    "string": "string",
    "double": "number",
    "float": "number",
}


def _of_shape(shape: Any) -> Schema:
    schema: Schema = {"type": TYPES[shape.type_name]} if shape.type_name in TYPES else {}
    if shape.type_name == "structure":
        schema["properties"] = {name: _of_shape(member) for name, member in shape.members.items()}
        schema["additionalProperties"] = False
    elif shape.type_name == "list":
        schema["items"] = _of_shape(shape.member)
    elif shape.type_name == "string" and shape.enum and shape.name != "InstanceType":  # new ones appear every month
        schema["enum"] = list(shape.enum)
    return schema


AZURE_SET_BY_RAY = (
    "adminUsername",
    "msi",
    "nsg",
    "publicKey",
    "provisionPublicIp",
    "subnet",
    "vmCount",
    "vmName",
    "vmTags",
    "zones",
)
AZURE_TYPES = {"string": "string", "int": "integer", "bool": "boolean", "object": "object", "array": "array"}


def azure_machine() -> Schema:
    """Return the schema of the parameters of Ray's template for machines on Azure."""
    import ray.autoscaler

    template = Path(ray.autoscaler.__file__).parent / "_private" / "_azure" / "azure-vm-template.json"
    known: dict[str, Schema] = {
        name: {"type": AZURE_TYPES[parameter["type"]]}
        for name, parameter in json.loads(template.read_text())["parameters"].items()
        if name not in AZURE_SET_BY_RAY
    }
    known |= {"priority": {"enum": ["Regular", "Spot"]}, "evictionPolicy": {"enum": ["Delete", "Deallocate"]}}
    return mapping(
        "azure_arm_parameters",
        azure_arm_parameters=mapping("vmSize", **known, availability_zone=TEXT),
        tags={"type": "object"},
    )


QUANTITY = {"type": ["string", "number"], "minimum": 0, "pattern": r"^\d+(\.\d+)?(m|k|[KMGTPE]i?)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}

CONTAINER = mapping(
    "name image",
    **anything("args envFrom imagePullPolicy lifecycle livenessProbe readinessProbe resizePolicy restartPolicy"),
    **anything("securityContext startupProbe stdin stdinOnce terminationMessagePath terminationMessagePolicy tty"),
    **anything("volumeDevices workingDir"),
    name=TEXT,
    image=TEXT,
    command=listed(TEXT),
    env=listed(mapping("name", name=TEXT, value=TEXT, valueFrom={"type": "object"})),
    ports=listed(
        mapping("containerPort", containerPort=NUMBER, name=TEXT, hostIP=TEXT, hostPort=NUMBER, protocol=TEXT)
    ),
    resources=mapping("", requests=QUANTITIES, limits=QUANTITIES, claims=ANY),
    volumeMounts=listed(
        mapping(
            "name mountPath",
            name=TEXT,
            mountPath=TEXT,
            readOnly=FLAG,
            **anything("mountPropagation recursiveReadOnly subPath subPathExpr"),
        )
    ),
)

POD = mapping(
    "spec",
    metadata={"type": "object"},
    spec=mapping(
        "containers",
        **anything(
            "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks"
        ),
        **anything("ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname imagePullSecrets"),
        **anything("initContainers nodeName os overhead preemptionPolicy priority priorityClassName readinessGates"),
        **anything(
            "resourceClaims resources runtimeClassName schedulerName schedulingGates securityContext serviceAccount"
        ),
        **anything("setHostnameAsFQDN shareProcessNamespace subdomain terminationGracePeriodSeconds"),
        **anything("topologySpreadConstraints"),
        containers=listed(CONTAINER) | {"minItems": 1},
        nodeSelector={"type": "object"},
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        serviceAccountName=TEXT,
        tolerations=listed(
            mapping(
                "",
                key=TEXT,
                operator={"enum": ["Exists", "Equal"]},
                value=TEXT,
                tolerationSeconds=NUMBER,
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            )
        ),
        volumes=listed({"type": "object", "required": ["name"]}),
    ),
)

WORDS = {"type": "object", "additionalProperties": TEXT}  # Kubernetes rejects numbers here: quote them
GROUP = {"labels": WORDS, "resources": WORDS, "rayStartParams": WORDS, "template": POD}

# KubeRay's CRDs of version ray.io/v1, from https://ray-project.github.io/kuberay/reference/api/
CLUSTER_SPEC = mapping(
    "rayVersion headGroupSpec workerGroupSpecs",
    **anything("gcsFaultToleranceOptions headServiceAnnotations historyServerOptions managedBy networkPolicy suspend"),
    **anything("tlsOptions upgradeStrategy"),
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=mapping(
        "",
        **anything("env envFrom image imagePullPolicy resources securityContext volumeMounts"),
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=NUMBER,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    authOptions=mapping("", mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    headGroupSpec=mapping(
        "template",
        **GROUP,
        **anything("ingressOptions"),
        enableIngress=FLAG,
        headService={"type": "object", "properties": {"spec": {"type": "object"}}},
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    ),
    workerGroupSpecs=listed(
        mapping(
            "groupName template minReplicas maxReplicas",
            **GROUP,
            **anything("scaleStrategy suspend"),
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            numOfHosts=NUMBER,
            idleTimeoutSeconds=NUMBER,
            priority={"type": "integer"},
        )
    )
    | {"minItems": 1},
)

JOB_SPEC = mapping(
    "entrypoint rayClusterSpec",
    **anything("activeDeadlineSeconds deletionStrategy entrypointNumCpus entrypointNumGpus entrypointResources jobId"),
    **anything("managedBy metadata preRunningDeadlineSeconds submitterConfig submitterPodTemplate suspend"),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    backoffLimit=NUMBER,
    ttlSecondsAfterFinished=NUMBER,
    shutdownAfterJobFinishes=FLAG,
    rayClusterSpec=CLUSTER_SPEC,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
)

METADATA = mapping("name", **anything("annotations labels"), name=TEXT, namespace=TEXT)
KUBERAY: dict[str, Schema] = {
    kind: mapping(
        "apiVersion kind metadata spec", apiVersion={"enum": ["ray.io/v1"]}, kind=TEXT, metadata=METADATA, spec=spec
    )
    for kind, spec in (("RayCluster", CLUSTER_SPEC), ("RayJob", JOB_SPEC))
}
