/** Restore tests of points: their file systems are checked, a machine is started from them. What is wrong becomes a finding. */
import { bootMachine, type BootDisk, type BootResult } from '../boot/boot.js';
import type { Clock } from '../clock.js';
import { isKind, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image } from '../image.js';
import type { Finding } from './findings.js';
import { checkFileSystems, type FileSystemCheck, type FsckOptions } from './fsck.js';

export interface TestedPoint {
  readonly volumeId: string;
  readonly volume: string;
  readonly seq: number;
}

export interface RestoreTestOptions {
  readonly clock: Clock;
  readonly events: EventSink;
  readonly cacheDir: string;
  readonly signal?: AbortSignal | undefined;
}

function objectOf({ volumeId }: TestedPoint): string {
  return `volumes/${volumeId}`;
}

/** Reading failed: the data passes of verify say where; here it is why nothing else can be said. */
function readFailure(point: TestedPoint, kind: 'filesystem' | 'boot', error: unknown): Finding {
  if (!isKind(error, 'damaged', 'io', 'not-found')) throw error;
  return {
    severity: isKind(error, 'damaged') ? 'damage' : 'unreadable',
    kind,
    object: objectOf(point),
    message: `point #${point.seq} of volume ${point.volume} cannot be read: ${messageOf(error)}`,
    hint: 'Run "b2 verify --data all": it says which points need the damaged places.',
  };
}

/** Checks every file system of the image, which is taken over. */
export async function testFileSystems(
  image: Image,
  point: TestedPoint,
  options: RestoreTestOptions & Pick<FsckOptions, 'companions' | 'checked'>,
): Promise<{ readonly checks: readonly FileSystemCheck[]; readonly findings: readonly Finding[] }> {
  let checks: readonly FileSystemCheck[];
  try {
    checks = await checkFileSystems(image, { name: point.volume, ...options });
  } catch (error) {
    return { checks: [], findings: [readFailure(point, 'filesystem', error)] };
  }
  const findings = checks.flatMap((check): readonly Finding[] => {
    if (check.state === 'sound') return [];
    const what = `the ${check.type} in ${check.name} of point #${point.seq} of volume ${point.volume}`;
    const isFaulty = check.state === 'faulty';
    return [
      {
        severity: isFaulty ? 'damage' : 'note',
        kind: 'filesystem',
        object: objectOf(point),
        message: `${what} ${isFaulty ? 'is not sound' : 'was not checked'}: ${check.message ?? ''}`,
        ...(isFaulty
          ? {
              hint: 'If the data are whole (b2 verify --data all), the file system was like that on the device: check it there.',
            }
          : {}),
      },
    ];
  });
  return { checks, findings };
}

/**
 * Starts a machine from the disks, which are taken over, alone on no network, and waits for the text on its console. `point` is that of the
 * first; `lacking` are the volumes of its group that have no point of that instant.
 */
export async function testBoot(
  disks: readonly BootDisk[],
  point: TestedPoint,
  options: RestoreTestOptions & {
    readonly console: string;
    readonly timeoutMs: number;
    readonly memoryBytes?: number | undefined;
    readonly screenshot?: string | undefined;
    readonly lacking?: readonly string[];
  },
): Promise<{ readonly result: BootResult | undefined; readonly findings: readonly Finding[] }> {
  const { console: text, lacking = [], ...rest } = options;
  let result: BootResult;
  try {
    result = await bootMachine(disks, { ...rest, checks: { console: text }, network: false });
  } catch (error) {
    return { result: undefined, findings: [readFailure(point, 'boot', error)] };
  }
  if (result.ok) return { result, findings: [] };
  const what = `no machine started from point #${point.seq} of volume ${point.volume}`;
  const look = `Look at it: "b2 boot ${point.volume} --at #${point.seq}".`;
  return {
    result,
    findings: [
      lacking.length === 0
        ? {
            severity: 'damage',
            kind: 'boot',
            object: objectOf(point),
            message: `${what}: ${result.why ?? ''}`,
            hint: `${look} The console must be on the serial port (console=ttyS0).`,
          }
        : {
            // It may need them: that it does not start by itself proves nothing.
            severity: 'unreadable',
            kind: 'boot',
            object: objectOf(point),
            message: `${what} without ${lacking.join(', ')} of its group, which ${lacking.length === 1 ? 'has' : 'have'} no point of that instant: ${result.why ?? ''}`,
            hint: `${look} A point that all of the group have ("b2 points ${point.volume}", GROUP) proves more.`,
          },
    ],
  };
}
