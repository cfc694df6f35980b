/** From options and configuration to what is watched, and how. */
import { realpathSync } from 'node:fs';
import { resolve } from 'node:path';
import { DEFAULT_FREEZE_MS } from '../../capture/freeze/index.js';
import type { Config, WatchedDevice, WatchSource } from '../../config.js';
import { B2Error } from '../../errors.js';
import type { WatchTarget } from '../../watch/daemon.js';
import type { WatchInput } from '../watch.js';

/** A device with all that is set for it. Options win over the device's own settings, these over those for all. */
export interface Target extends WatchTarget {
  readonly volume: string | undefined;
  /** Devices that share their points with it, itself included. */
  readonly group: { readonly name: string; readonly devices: readonly string[] } | undefined;
  readonly source: WatchSource;
  readonly intervalMs: number;
  /** 0: nothing is frozen, ever. */
  readonly freezeMs: number;
  /** Time without an exact point after which file systems are frozen unasked; undefined: never unasked. */
  readonly freezeAfterMs: number | undefined;
  readonly prePoint: string | undefined;
  readonly postPoint: string | undefined;
  readonly hookMs: number;
}

export const DEFAULT_INTERVAL_MS = 1_000;
export const DEFAULT_HOOK_MS = 30_000;
export const DEFAULT_FREEZE_AFTER_MS = 5_000;
const MIN_INTERVAL_MS = 50;
const MAX_INTERVAL_MS = 86_400_000;
/** A freeze stops every writer; nobody means a longer one. */
const MAX_FREEZE_MS = 60_000;

function within(what: string, value: number, least: number, most: number): number {
  if (value < least || value > most)
    throw new B2Error('usage', `${what}: ${value} ms is not within ${least} ms and ${most} ms`);
  return value;
}

/** The file or node that a path leads to; the path itself if it does not exist now. */
function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return resolve(path);
  }
}

/** Changes with what a running session cannot take over: {@link WatchTarget.key}. */
export function keyOf(
  { volume, source, intervalMs }: Pick<Target, 'volume' | 'source' | 'intervalMs'>,
  group: Target['group'],
): string {
  return JSON.stringify([volume, source, intervalMs, group]);
}

/** Kind `usage` for options that do not go together, or no device at all. */
export function targetsOf(input: WatchInput, config: Config): readonly Target[] {
  const { options } = input;
  const { devices } = input.arguments;
  const asked = options.source;
  if (asked === 'nbd')
    throw new B2Error('unsupported', 'the nbd source (write splitter) is not in this version', {
      hint: 'Use --source trace, which makes exact points on any block device, or --source scan.',
    });
  const configured = config['watch.devices'] ?? [];
  if (devices.length === 0 && configured.length === 0)
    throw new B2Error('usage', 'no device to watch', {
      hint: 'Name devices (lsblk lists them), or list them as watch.devices in the configuration file.',
    });
  const chosen: readonly WatchedDevice[] =
    devices.length === 0
      ? configured
      : devices.map((device) => {
          const same = configured.find((c) => realPath(c.device) === realPath(device));
          return { ...same, device };
        });
  if (options.volume !== undefined && chosen.length > 1)
    throw new B2Error('usage', '--volume names the volume of one device, and there are several', {
      hint: 'Use "volume" under watch.devices in the configuration file.',
    });
  const groups = new Map<string, string[]>();
  const groupOf = (d: WatchedDevice): string | undefined =>
    options.group ?? d.group ?? config['watch.group'];
  for (const d of chosen) {
    const name = groupOf(d);
    if (name === '') throw new B2Error('usage', `the group of ${d.device} has no name`);
    if (name !== undefined) groups.set(name, [...(groups.get(name) ?? []), resolve(d.device)]);
  }
  for (const [name, { length }] of groups) {
    // One device of a group can be watched alone if it is named for that; a configuration with such a group is a mistake.
    if (length < 2 && (options.group !== undefined || devices.length === 0))
      throw new B2Error('usage', `group ${name} has one device only: it has nobody to share with`, {
        hint: 'Name two devices or more, or give them the same "group" in the configuration file.',
      });
  }
  const seen = new Map<string, string>();
  return chosen.map((d): Target => {
    // Absolute: it is shown to, and compared by, processes of other working directories.
    const device = resolve(d.device);
    const real = realPath(device);
    const twin = seen.get(real);
    if (twin !== undefined)
      throw new B2Error('usage', `${twin} and ${device} are the same device (${real})`);
    seen.set(real, device);
    const volume = options.volume ?? d.volume;
    const source = asked ?? d.source ?? config['watch.source'] ?? 'auto';
    const intervalMs = within(
      `interval of ${device}`,
      options.interval ?? d.interval ?? config['watch.interval'] ?? DEFAULT_INTERVAL_MS,
      MIN_INTERVAL_MS,
      MAX_INTERVAL_MS,
    );
    const groupName = groupOf(d);
    const members = (groupName === undefined ? undefined : groups.get(groupName)) ?? [];
    const group =
      groupName === undefined || members.length < 2
        ? undefined
        : { name: groupName, devices: members };
    const freezing = options.freeze ?? d.freeze ?? config['watch.freeze'] ?? 'auto';
    const limitMs = within(
      `freeze limit of ${device}`,
      options['freeze-limit'] ??
        d['freeze-limit'] ??
        config['watch.freeze-limit'] ??
        DEFAULT_FREEZE_MS,
      0,
      MAX_FREEZE_MS,
    );
    const afterMs = within(
      `freeze-after of ${device}`,
      options['freeze-after'] ??
        d['freeze-after'] ??
        config['watch.freeze-after'] ??
        DEFAULT_FREEZE_AFTER_MS,
      1000,
      MAX_INTERVAL_MS,
    );
    const freezeMs = freezing === 'never' ? 0 : limitMs;
    const prePoint = d['pre-point'] ?? config['watch.pre-point'];
    const postPoint = d['post-point'] ?? config['watch.post-point'];
    return {
      device,
      key: keyOf({ volume, source, intervalMs }, group),
      hasHooks: prePoint !== undefined || postPoint !== undefined,
      volume,
      group,
      source,
      intervalMs,
      freezeMs,
      freezeAfterMs: freezing === 'auto' && freezeMs > 0 ? afterMs : undefined,
      prePoint,
      postPoint,
      hookMs: d['hook-limit'] ?? config['watch.hook-limit'] ?? DEFAULT_HOOK_MS,
    };
  });
}
