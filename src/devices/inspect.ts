/** What is on a device: partition table and the contents of each partition, for a volume's facts and for refusals. */
import { B2Error } from '../errors.js';
import { runTool, type RunTool } from './run.js';
import { findSignatures, type Area, type Signature, type SignatureUsage } from './signatures.js';
import {
  readExactly,
  readPartitionTable,
  type PartitionFacts,
  type Readable,
  type TableFacts,
} from './table.js';

const BLKID_TIMEOUT_MS = 10_000;
/** A target whose first and last bytes of this length are zeros, and that nothing recognises, counts as empty. */
const EDGE_BYTES = 1024 * 1024;

/** A partition and what lies in it. JSON-able. */
export interface InspectedPartition extends PartitionFacts {
  readonly contents: readonly Signature[];
}

/** What is on a device. JSON-able: goes into a volume's meta as it is. */
export interface DeviceContents {
  /** Absent if there is no partition table. */
  readonly table?: Omit<TableFacts, 'partitions'> & {
    readonly partitions: readonly InspectedPartition[];
  };
  /** What lies on the device itself, outside of partitions. Usually empty where there is a table. */
  readonly contents: readonly Signature[];
}

/** Reads what is on `device`. Tools that are missing make the answer poorer, never an error. */
export async function inspectDevice(
  device: Readable,
  run: RunTool = runTool,
): Promise<DeviceContents> {
  const table = await readPartitionTable(device);
  const whole = await findSignatures(device, { offsetBytes: 0, sizeBytes: device.facts.sizeBytes });
  if (table === undefined) {
    const contents = whole.length > 0 ? whole : await askBlkid(device, undefined, run);
    return { contents };
  }
  const partitions: InspectedPartition[] = [];
  for (const partition of table.facts.partitions) {
    partitions.push({
      ...partition,
      contents: partition.kind === 'extended' ? [] : await contentsOf(device, partition, run),
    });
  }
  return { table: { ...table.facts, partitions }, contents: whole };
}

async function contentsOf(
  device: Readable,
  area: Area,
  run: RunTool,
): Promise<readonly Signature[]> {
  const own = await findSignatures(device, area);
  return own.length > 0 ? own : askBlkid(device, area, run);
}

const USAGE: Readonly<Record<string, SignatureUsage>> = {
  filesystem: 'filesystem',
  raid: 'raid',
  crypto: 'encrypted',
};

/** What blkid knows of the area; empty if it is not installed, knows nothing, or fails. */
async function askBlkid(
  device: Readable,
  area: Area | undefined,
  run: RunTool,
): Promise<readonly Signature[]> {
  const place =
    area === undefined ? [] : ['-O', String(area.offsetBytes), '-S', String(area.sizeBytes)];
  try {
    const result = await run(
      'blkid',
      ['-p', '-o', 'export', ...place, '--', device.facts.realPath],
      BLKID_TIMEOUT_MS,
    );
    if (result === undefined) return [];
    // Status 8: several signatures that contradict each other.
    if (result.status === 8) return [{ type: 'several signatures', usage: 'other' }];
    return result.status === 0 ? parseBlkid(result.stdout) : [];
  } catch {
    return [];
  }
}

/** The signature in the output of `blkid -o export`. A partition table alone is none. */
export function parseBlkid(output: string): readonly Signature[] {
  const values = new Map<string, string>();
  for (const line of output.split('\n')) {
    const at = line.indexOf('=');
    if (at > 0) values.set(line.slice(0, at), line.slice(at + 1).replaceAll(/\\(.)/g, '$1'));
  }
  const type = values.get('TYPE');
  if (type === undefined) return [];
  const label = values.get('LABEL');
  const uuid = values.get('UUID');
  return [
    {
      type,
      usage: type === 'swap' ? 'swap' : (USAGE[values.get('USAGE') ?? ''] ?? 'other'),
      ...(label === undefined ? {} : { label }),
      ...(uuid === undefined ? {} : { uuid }),
    },
  ];
}

const USAGE_WORDS: Readonly<Record<SignatureUsage, string>> = {
  filesystem: 'file system',
  swap: 'swap space',
  raid: 'LVM or RAID member',
  encrypted: 'encrypted volume',
  other: 'signature',
};

/** “an ext4 file system labelled "root"”. */
export function describeSignature(signature: Signature): string {
  const label = signature.label === undefined ? '' : ` labelled ${JSON.stringify(signature.label)}`;
  if (signature.usage === 'swap') return `swap space${label}`;
  if (signature.type === 'several signatures')
    return 'several signatures that contradict each other';
  const article = /^([aeio]|xfs|ntfs|f2fs|LVM)/.test(signature.type) ? 'an' : 'a';
  return `${article} ${signature.type} ${USAGE_WORDS[signature.usage]}${label}`;
}

/**
 * What a restore to `target` would destroy, one phrase each, for the refusal without --force: partition table, file
 * systems and all else that b2 or blkid knows, and data in the first and last MiB. Empty means: nothing was found.
 */
export async function describeContents(
  target: Readable,
  run: RunTool = runTool,
): Promise<readonly string[]> {
  const found: string[] = [];
  const { table, contents } = await inspectDevice(target, run);
  if (table !== undefined) {
    const count = table.partitions.length;
    found.push(
      `a ${table.type.toUpperCase()} partition table with ${count === 1 ? 'one partition' : `${count} partitions`}`,
    );
    for (const partition of table.partitions) {
      for (const signature of partition.contents)
        found.push(`${describeSignature(signature)} in partition ${partition.number}`);
    }
  }
  for (const signature of contents) found.push(describeSignature(signature));
  if (found.length > 0) return found;
  const { sizeBytes } = target.facts;
  const edge = Math.min(EDGE_BYTES, sizeBytes);
  for (const [offset, where] of [
    [0, 'at the beginning'],
    [sizeBytes - edge, 'at the end'],
  ] as const) {
    const bytes = await readExactly(target, offset, edge);
    if (bytes === undefined)
      throw new B2Error('io', `${target.facts.path} changed its size while it was being looked at`);
    if (bytes.some((byte) => byte !== 0)) found.push(`unknown data ${where} (not all zeros)`);
  }
  return found;
}
