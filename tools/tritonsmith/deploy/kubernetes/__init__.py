"""A repository for Kubernetes: a Kustomize base and the overlays cpu, gpu and kserve, from measurements.

base/                          Deployment, Services, ServiceAccount, HPA, PodDisruptionBudget, NetworkPolicy
components/keda/               a ScaledObject in place of the HPA
overlays/cpu/ overlays/gpu/    the images, and what a GPU needs
overlays/kserve/               ServingRuntime and InferenceService, which bring their own Deployment
prometheus-adapter.yaml        Helm values: the rule that gives the HPA its metric
measurements.json README.md    where the numbers come from, and what to do
"""

from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.kubernetes.render import render_kubernetes

__all__ = ["KubernetesOptions", "render_kubernetes"]
