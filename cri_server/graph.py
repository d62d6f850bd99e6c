# SPDX-License-Identifier: Apache-2.0
"""Every long-lived object of the server, made by hand, in dependency order.

    ground      records, layers, namespaces, the network, shims, bundles
    images      the image store, its collector, the registry client
    pods        containers and pods, their events, recovery
    services    what answers: exec, streaming, stats, metrics, info, cAdvisor's socket

Making them does nothing to the host yet, but for reading the records; `server` starts them. What
needs closing is on the stack, and closed the other way round.
"""

import contextlib
import os

from cri_server import (
    apparmor,
    bundles,
    cdi,
    cgroup_prewarm,
    cgroups,
    config,
    containers,
    crio,
    events,
    exec,
    guest_stats,
    handlers,
    host_inputs,
    imagehost,
    imagevolumes,
    info,
    leftovers,
    metrics,
    orphans,
    podfiles,
    pods,
    recovery,
    sandbox_container,
    selinux_relabel,
    shims,
    snapshots,
    state,
    stats,
    updates,
)
from cri_server.images import gc, load, pull, registry, store
from cri_server.network import cni
from cri_server.services import archives, image, runtime
from cri_server.streaming import requests
from cri_server.streaming import server as streaming
from shim import client


class Graph:
    """The objects; those without an underscore are started or served by `server`."""

    def __init__(
        self,
        settings: config.Config,
        groups: cgroups.Cgroups,
        live: handlers.Handlers,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._settings, self._groups, self._live = settings, groups, live
        self._stack = stack
        self._make_ground()
        self._make_images()
        self._make_pods()
        self._make_services()

    def _make_ground(self) -> None:
        settings, root = self._settings, self._settings.server.root
        self._records = state.Store(root)
        self._records.load()
        self.layers = snapshots.Snapshots(root)
        if policy := self._live.host_facts.selinux:
            for folder in self.layers.read_only:
                selinux_relabel.once(os.path.realpath(folder), policy.read_only)
        self._files = podfiles.PodFiles(settings.server.state)
        self.network = cni.Network(settings.network)
        self._stack.push_async_callback(self.network.close)
        self.zygotes = client.Zygotes()
        self._shims = shims.Shims(
            settings,
            live=self._live,
            zygotes=self.zygotes,
            files=self._files,
            driver=self._groups.driver,
        )
        self._stack.push_async_callback(self._shims.close)
        self._volumes = imagevolumes.ImageVolumes(settings.server.state, self.layers)
        self._profiles = apparmor.AppArmor()
        self._prewarm = cgroup_prewarm.Prewarm(self._groups.hierarchy.mounts)
        self._stack.push_async_callback(self._prewarm.close)
        self._orphans = orphans.Orphans()
        self._leftovers = leftovers.Leftovers(settings, self._live, self._groups, self._orphans)
        self._guests = guest_stats.GuestStats(settings, self._live, self._shims)
        devices = cdi.Registry(settings.runtime.cdi_spec_dirs)
        self._bundles = bundles.Bundles(
            settings,
            live=self._live,
            files=self._files,
            groups=self._groups,
            layers=self.layers,
            resolver=host_inputs.Resolver(self._files, self._volumes, devices, self._profiles),
            leftover_host=self._leftovers,
        )

    def handlers_in_use(self) -> set[str]:
        """Return the keys of handlers that records name."""
        of_containers = {c.handler for c in self._records.containers()}
        return of_containers | {p.handler for p in self._records.pods()}

    def _make_images(self) -> None:
        wanted = self._settings.images
        self._images = store.Store(self._settings.server.root, pinned=wanted.pinned)
        self.collector = gc.Collector(self._images, self.layers, in_use=self._layers_in_use)
        puller = pull.Puller(
            client=registry.Client(
                wanted.registry_config_dirs, progress_timeout=wanted.pull_progress_timeout
            ),
            images=self._images,
            layer_host=self.layers,
            collector=self.collector,
            parallel=wanted.max_parallel_downloads,
            patience=wanted.pull_progress_timeout,
        )
        self._stack.push_async_callback(puller.close)
        self.image = image.ImageService(
            imagehost.ImageHost(
                puller=puller,
                image_store=self._images,
                layers=self.layers,
                collector=self.collector,
            )
        )

        self.archives = archives.ArchiveService(
            load.Loader(images=self._images, layer_host=self.layers, collector=self.collector)
        )

    def _layers_in_use(self) -> set[str]:
        of_containers = (layer for c in self._records.containers() for layer in c.layers)
        return {*of_containers, *self._volumes.in_use()}

    def _make_pods(self) -> None:
        self.events = events.Events(
            lambda pod_id: (self.pods.status(pod_id), self._containers.statuses(pod_id))
        )
        self._containers = containers.Containers(
            live=self._live,
            store=self._records,
            image_store=self._images,
            collector=self.collector,
            bundle_host=self._bundles,
            leftover_host=self._leftovers,
            shim_host=self._shims,
            update_host=self._updates(),
            event_host=self.events,
            prewarm=self._prewarm,
        )
        self._stack.push_async_callback(self._containers.close)
        self.pods = pods.Pods(
            settings=self._settings,
            live=self._live,
            store=self._records,
            files=self._files,
            groups=self._groups,
            network=self.network,
            shim_host=self._shims,
            container_host=self._containers,
            leftover_host=self._leftovers,
            sandbox_host=self._sandboxes(),
            volumes=self._volumes,
            event_host=self.events,
        )
        self._stack.push_async_callback(self.pods.close)
        self.recovery = recovery.Recovery(
            store=self._records,
            pod_host=self.pods,
            container_host=self._containers,
            shim_host=self._shims,
            bundle_host=self._bundles,
            leftover_host=self._leftovers,
            orphan_host=self._orphans,
            files=self._files,
            layers=self.layers,
        )
        self._stack.push_async_callback(self.recovery.close)

    def _sandboxes(self) -> sandbox_container.SandboxContainers:
        return sandbox_container.SandboxContainers(
            live=self._live,
            files=self._files,
            groups=self._groups,
            shim_host=self._shims,
            profiles=self._profiles,
        )

    def _updates(self) -> updates.Updates:
        return updates.Updates(
            live=self._live,
            store=self._records,
            groups=self._groups,
            bundle_host=self._bundles,
            shim_host=self._shims,
        )

    def _make_services(self) -> None:
        exec_host = exec.Exec(
            settings=self._settings,
            container_host=self._containers,
            bundle_host=self._bundles,
            shim_host=self._shims,
            prewarm=self._prewarm,
        )
        self.runtime = runtime.RuntimeService(
            pod_host=self.pods,
            container_host=self._containers,
            exec_host=exec_host,
            stats_host=self._stats(),
            metrics_host=self._metrics(),
            info_host=self._info(),
            event_host=self.events,
            stream_requests=self._requests(exec_host),
        )
        self.crio = crio.Crio(
            settings=self._settings,
            pod_host=self.pods,
            container_host=self._containers,
            groups=self._groups,
            layers=self.layers,
        ).server()
        self._stack.push_async_callback(self.crio.close)

    def _requests(self, exec_host: exec.Exec) -> requests.Requests:
        self.streaming = streaming.Server(self._settings.server, shim_host=self._shims)
        self._stack.push_async_callback(self.streaming.close)
        return requests.Requests(
            live=self._live,
            pod_host=self.pods,
            container_host=self._containers,
            exec_host=exec_host,
            streaming=self.streaming,
        )

    def _stats(self) -> stats.Stats:
        return stats.Stats(
            pod_host=self.pods,
            container_host=self._containers,
            groups=self._groups,
            layers=self.layers,
            guests=self._guests,
        )

    def _metrics(self) -> metrics.Metrics:
        return metrics.Metrics(
            settings=self._settings.metrics,
            pod_host=self.pods,
            container_host=self._containers,
            groups=self._groups,
            layers=self.layers,
            guests=self._guests,
        )

    def _info(self) -> info.Info:
        return info.Info(
            settings=self._settings,
            live=self._live,
            groups=self._groups,
            network=self.network,
            pod_host=self.pods,
            container_host=self._containers,
            bundle_host=self._bundles,
            pod_files=self._files,
        )
