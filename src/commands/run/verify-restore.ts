/** `b2 verify --fsck` and `--boot`: restore tests of one point of each volume. */
import { B2Error, messageOf } from '../../errors.js';
import { groupNameOf, GroupVolumes, type Companions } from '../../files/companions.js';
import { PointClass } from '../../format/commit.js';
import { VolumeHistory } from '../../repo/history.js';
import { allowReadAhead, openImage } from '../../repo/point.js';
import { choosePointSet } from '../../repo/point-set.js';
import type { Repository } from '../../repo/repository.js';
import { Timeline } from '../../repo/timeline.js';
import type { VolumeMeta } from '../../repo/volume.js';
import type { Finding } from '../../verify/findings.js';
import type { FileSystemCheck, SharedChecks } from '../../verify/fsck.js';
import { testBoot, testFileSystems } from '../../verify/restore-test.js';
import { parseWhen, type When } from '../../when.js';
import type { CommandContext } from '../spec.js';
import type { VerifyInput } from '../verify.js';
import { bootFields, type BootAnswer } from './boot.js';
import { firstPoint, openDisks, tellTo } from './boot-disks.js';
import type { PointRow } from './rows.js';

/** What was tested of one volume. */
export interface RestoreTest {
  readonly volumeId: string;
  readonly volume: string;
  readonly point: PointRow;
  /** With --fsck. */
  readonly fileSystems?: readonly FileSystemCheck[];
  /** With --boot; missing as well if the image could not be read. */
  readonly boot?: Omit<BootAnswer, 'volume' | 'volumeId' | 'point'>;
}

/** Tests one point of each volume, one after the other. `known` are all volumes of the repository: a machine has those of its group. */
export async function restoreTests(
  context: CommandContext,
  input: VerifyInput,
  repo: Repository,
  volumes: readonly VolumeMeta[],
  known: readonly VolumeMeta[],
): Promise<{ readonly tests: readonly RestoreTest[]; readonly findings: readonly Finding[] }> {
  const { options } = input;
  const tests: RestoreTest[] = [];
  const findings: Finding[] = [];
  /** What was checked of what lies on several volumes, by group and instant. */
  const checkedAt = new Map<string, SharedChecks>();
  allowReadAhead(repo, repo.store.url, (error) =>
    context.events({ type: 'warning', message: `reading ahead has ended: ${messageOf(error)}` }),
  );
  for (const volume of volumes) {
    const isRandom = options['random-point'];
    const when = isRandom
      ? await randomPoint(context, repo, volume)
      : parseWhen(options.at, context.clock.nowNs());
    const set = await choosePointSet(repo, known, volume, when, {
      alone: !options.boot,
      whole: isRandom,
      ...tellTo(context.events),
    });
    try {
      const { commit, history } = set.first;
      const point = { volumeId: volume.id, volume: volume.name, seq: commit.seq };
      const { clock, events, signal } = context;
      const { cacheDir } = context.settings;
      let fileSystems: readonly FileSystemCheck[] | undefined;
      let boot: RestoreTest['boot'];
      if (options.fsck) {
        const image = await openImage(history, volume, commit.seq);
        const group = new GroupVolumes(repo, volume, (message) =>
          events({ type: 'warning', message }),
        );
        const instant = `${volume.host} ${groupNameOf(volume)} ${commit.instantNs}`;
        const checked = checkedAt.get(instant) ?? (new Map() as SharedChecks);
        checkedAt.set(instant, checked);
        const companions = (): Promise<Companions | undefined> => group.at(commit);
        const common = { clock, events, signal, cacheDir };
        try {
          const tested = await testFileSystems(image, point, { ...common, companions, checked });
          fileSystems = tested.checks;
          findings.push(...tested.findings);
        } finally {
          await group.close();
        }
      }
      if (options.boot) {
        const tested = await testBoot(await openDisks(repo, set), point, {
          clock,
          events,
          signal,
          cacheDir,
          console: options['boot-check'],
          timeoutMs: options['boot-timeout'],
          lacking: set.left.map((l) => l.volume.name),
        });
        if (tested.result !== undefined) boot = bootFields(tested.result, set);
        findings.push(...tested.findings);
      }
      tests.push({
        volumeId: volume.id,
        volume: volume.name,
        point: firstPoint(set),
        ...(fileSystems === undefined ? {} : { fileSystems }),
        ...(boot === undefined ? {} : { boot }),
      });
    } finally {
      await set.close();
    }
  }
  return { tests, findings };
}

/** The point of a time that is as likely as any other since the first point. */
async function randomPoint(
  context: CommandContext,
  repo: Repository,
  volume: VolumeMeta,
): Promise<When> {
  const history = await VolumeHistory.open(repo, volume.id);
  try {
    const timeline = new Timeline(history.sources);
    const newest = await timeline.latest(PointClass.crash);
    let oldest: bigint | undefined;
    for await (const commit of timeline.list()) {
      oldest = commit.instantNs;
      break;
    }
    if (newest === undefined || oldest === undefined)
      throw new B2Error('not-found', `volume ${volume.name} has no exact point yet`);
    const dice = Buffer.from(context.random(8)).readBigUInt64LE();
    const span = newest.instantNs - oldest + 1n;
    return { kind: 'instant', ns: oldest + (dice % span) };
  } finally {
    await history.close();
  }
}
