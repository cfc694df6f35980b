/** From points that belong together (src/repo/point-set.ts) to the disks of a machine, and how both are shown. */
import { groupPointId } from '../../capture/group.js';
import { keepWrites, type OpenDiskOverlay } from '../../boot/overlays.js';
import { diskSerial, type BootDisk, type DiskBytes } from '../../boot/boot.js';
import type { EventSink } from '../../events.js';
import { formatDuration, formatTimeLocal, formatTimeNs } from '../../human.js';
import { openImage } from '../../repo/point.js';
import type { PointSet, PointSetOptions, SetReason } from '../../repo/point-set.js';
import type { Repository } from '../../repo/repository.js';
import { pointRow, type PointRow } from './rows.js';

/** A disk of a machine, in `--json` output. */
export interface BootDiskRow {
  readonly volume: string;
  readonly volumeId: string;
  readonly point: PointRow;
  /** `asked`: the volume that was named, which the machine boots from; `group`: the same instant of another volume of its group; `with`: --with. */
  readonly reason: SetReason;
  /** How much older its point is than that of the first disk; 0: the very same instant. */
  readonly secondsBefore: number;
  /** As the guest sees it (/dev/disk/by-id). */
  readonly serial: string;
}

/** What a machine was made of, in `--json` output. */
export interface MachineRow {
  /** In the order in which the machine has them: /dev/vda, /dev/vdb, … */
  readonly disks: readonly BootDiskRow[];
  /** The group whose volumes were looked for. */
  readonly group?: string;
  /** Volumes of the group that are not attached, because they have no point of the instant. */
  readonly leftOut?: readonly {
    readonly volume: string;
    readonly volumeId: string;
    readonly why: string;
  }[];
  /** A newer point that was passed over, because not all of the group have it. */
  readonly passedOver?: PointRow;
}

/** Warnings and notes of a choice as events. */
export function tellTo(events: EventSink): Pick<PointSetOptions, 'warn' | 'note'> {
  return {
    warn: (message, hint) =>
      events({ type: 'warning', message, ...(hint === undefined ? {} : { hint }) }),
    note: (message) => events({ type: 'note', message }),
  };
}

/** The point of the first disk, as {@link MachineRow} has it. */
export function firstPoint(set: PointSet): PointRow {
  return rowOf(set, 0);
}

function rowOf(set: PointSet, i: number): PointRow {
  const member = set.members[i] ?? set.first;
  const { commit, snapshot, reason } = member;
  const row = pointRow(commit, snapshot === undefined ? [] : [snapshot.name]);
  const isShared = set.group !== undefined && set.isWhole && reason !== 'with';
  // A group of which the repository has this volume only shares nothing.
  if (!isShared || set.members.every((m) => m.reason !== 'group')) return row;
  return { ...row, group: groupPointId(set.group, formatTimeNs(commit.instantNs)) };
}

export function machineRow(set: PointSet): MachineRow {
  const { group, left, passedOver } = set;
  return {
    disks: set.members.map((m, i) => ({
      volume: m.volume.name,
      volumeId: m.volume.id,
      point: rowOf(set, i),
      reason: m.reason,
      secondsBefore: Number(set.ageNs(m)) / 1e9,
      serial: diskSerial(m.volume.id),
    })),
    ...(group === undefined ? {} : { group }),
    ...(left.length === 0
      ? {}
      : {
          leftOut: left.map((l) => ({ volume: l.volume.name, volumeId: l.volume.id, why: l.why })),
        }),
    ...(passedOver === undefined ? {} : { passedOver: pointRow(passedOver) }),
  };
}

/** The row with what went to and from each disk. */
export function withBytes(
  row: MachineRow,
  bytes: readonly DiskBytes[],
): MachineRow & { readonly disks: readonly (BootDiskRow & Partial<DiskBytes>)[] } {
  return { ...row, disks: row.disks.map((disk, i) => ({ ...disk, ...bytes[i] })) };
}

/** For people: a line for each disk but the first. */
export function otherDiskLines(set: PointSet): readonly string[] {
  return set.members.slice(1).map((m) => {
    const ns = set.ageNs(m);
    const apart =
      ns === 0n ? 'the same instant' : `${formatDuration(Number(ns) / 1e9)} older, another instant`;
    return `  with ${m.volume.name} at ${formatTimeLocal(m.commit.instantNs)} (#${m.commit.seq}): ${apart}; serial ${diskSerial(m.volume.id)}`;
  });
}

/**
 * Opens the images of a set as disks for `bootMachine`, which takes them over. With `overlay` what is written to them is kept there
 * (src/boot/overlays.ts).
 */
export async function openDisks(
  repo: Repository,
  set: PointSet,
  overlay?: string,
): Promise<readonly BootDisk[]> {
  const overlays: readonly OpenDiskOverlay[] =
    overlay === undefined
      ? []
      : await keepWrites(
          overlay,
          set.members.map(({ volume, commit }) => ({
            name: volume.name,
            sizeBytes: commit.sizeBytes,
            identity: {
              repository: repo.config.id,
              volume: volume.id,
              seq: commit.seq,
              hash: commit.hash.toString('hex'),
            },
          })),
        );
  const disks: BootDisk[] = [];
  try {
    for (const [i, { volume, history, commit }] of set.members.entries()) {
      const image = await openImage(history, volume, commit.seq);
      const { id, name } = volume;
      disks.push({ name, image, serial: diskSerial(id), overlay: overlays[i] });
    }
  } catch (error) {
    await Promise.all(disks.map((d) => d.image.close()));
    throw error;
  }
  return disks;
}
