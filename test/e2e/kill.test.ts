/**
 * kill -9 of the real program, more than 200 times, at random moments of init, snapshot, key add, prune and restore. Whatever printed its
 * success must restore bit for bit, nothing that is shown may fail to, and the next command must work as if nothing had been.
 */
import { execFile, type ChildProcess } from 'node:child_process';
import { createHash } from 'node:crypto';
import { closeSync, openSync, readFileSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';
import { systemClock } from '../../src/clock.js';
import { PointClass } from '../../src/format/commit.js';
import { currentIdentity } from '../../src/process-identity.js';
import { VolumeHistory } from '../../src/repo/history.js';
import { parseKeyFile, type Secret } from '../../src/repo/keys.js';
import { openImage } from '../../src/repo/point.js';
import { Repository } from '../../src/repo/repository.js';
import { openDirectoryStore } from '../../src/repo/store-directory.js';
import { Timeline } from '../../src/repo/timeline.js';
import { listVolumes } from '../../src/repo/volume.js';
import { B2, type Ended, type Started } from '../support/b2.js';
import { seeded, testMeta } from '../support/model-volume.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;
const IMAGE_BYTES = 4 * MIB;
const CHUNK = 64 * 1024;
const KILLS = Number(process.env['B2_TEST_KILLS'] ?? 200);
const MOST_RUNS = 420;
const SEED = 20_261_122;

/** Two prunes without grace time, as a process: the command has a grace time of a day, and is not what is tested here. */
const PRUNE = `
const [dist, repository, keyFile] = process.argv.slice(1);
const at = (file) => import(new URL(file, dist).href);
const { Repository } = await at('repo/repository.js');
const { openDirectoryStore } = await at('repo/store-directory.js');
const { prune } = await at('retention/prune.js');
const { systemClock, systemRandom } = await at('clock.js');
const { currentIdentity } = await at('process-identity.js');
const { parseKeyFile } = await at('repo/keys.js');
const { readFileSync } = await import('node:fs');
const secrets = keyFile === '' ? [] : [{ kind: 'keyFile', material: parseKeyFile(readFileSync(keyFile, 'utf8'), keyFile), source: keyFile }];
const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
const repo = await Repository.open(await openDirectoryStore(repository), secrets, env);
const first = await prune(repo, { graceMs: 0 });
const second = await prune(repo, { graceMs: 0 });
await repo.close();
console.log(JSON.stringify({ freedBytes: first.freedBytes + second.freedBytes }));
`;
const DIST = pathToFileURL(fileURLToPath(new URL('../../dist/', import.meta.url))).href;

const digestOf = (data: Uint8Array): string => createHash('sha256').update(data).digest('hex');

/** How long a command takes from its start to its end when nobody disturbs it: kills fall into that time. */
class Life {
  private ms = 0;

  async measure(start: () => Started): Promise<Ended> {
    const begun = performance.now();
    const done = await start().ended;
    const took = performance.now() - begun;
    this.ms = this.ms === 0 ? took : this.ms * 0.7 + took * 0.3;
    return done;
  }

  /** A moment of it, 0 for that of the answer; the time in which Node starts and nothing happens is left out, mostly. */
  moment(random: () => number): number {
    return random() < 0.15 ? 0 : this.ms * (0.3 + 0.75 * random());
  }
}

interface Counts {
  kills: number;
  before: number;
  after: number;
  readonly of: Map<string, number>;
}

/** Runs a command and kills it at that moment, or (0) when it begins to answer. Counted only if it was still running. */
async function killed(
  what: string,
  started: Started,
  afterMs: number,
  counts: Counts,
): Promise<Ended> {
  const kill = (): void => void started.child.kill('SIGKILL');
  const timer = setTimeout(kill, afterMs === 0 ? 60_000 : afterMs);
  if (afterMs === 0) started.child.stdout?.once('data', kill);
  const done = await started.ended;
  clearTimeout(timer);
  if (done.signal === 'SIGKILL') {
    counts.kills++;
    counts.of.set(what, (counts.of.get(what) ?? 0) + 1);
    if (answerOf(done) === undefined) counts.before++;
    else counts.after++;
  }
  return done;
}

/** What it printed, if it got as far. */
function answerOf(done: Ended): Record<string, unknown> | undefined {
  try {
    return JSON.parse(done.stdout) as Record<string, unknown>;
  } catch {
    return undefined;
  }
}

/** One repository, one image file, and what was promised of it. */
class Subject {
  readonly b2: B2;
  readonly keyFile: string | undefined;
  readonly image: string;
  readonly lives = {
    snapshot: new Life(),
    prune: new Life(),
    restore: new Life(),
    keyAdd: new Life(),
  };
  readonly promised = new Map<number, string>();
  private readonly data: Buffer = Buffer.alloc(IMAGE_BYTES);
  private readonly dir: TempDir;
  private readonly name: string;
  private readonly random: () => number;
  private newest = 0;

  constructor(dir: TempDir, name: string, encrypted: boolean, random: () => number) {
    this.dir = dir;
    this.name = name;
    this.random = random;
    this.keyFile = encrypted ? dir.join(`${name}.key`) : undefined;
    this.b2 = new B2(dir, encrypted ? { B2_KEY_FILE: this.keyFile } : {}, dir.join(`${name}.repo`));
    this.image = dir.join(`${name}.img`);
    writeFileSync(this.image, this.data);
    this.change(64);
  }

  initArgs(): string[] {
    return [
      '--json',
      'init',
      '--pack-size',
      '1M',
      ...(this.keyFile === undefined ? ['--encryption', 'none'] : []),
    ];
  }

  /** Writes some chunks of the image anew. */
  change(chunks: number): void {
    const fd = openSync(this.image, 'r+');
    for (let n = 0; n < chunks; n++) {
      const at = Math.floor(this.random() * (IMAGE_BYTES / CHUNK)) * CHUNK;
      const part = this.data.subarray(at, at + CHUNK);
      const kind = this.random();
      if (kind < 0.2) part.fill(0);
      else
        for (let i = 0; i < CHUNK; i += 4)
          part.writeUInt32LE(Math.floor(this.random() * (kind < 0.6 ? 2 ** 32 : 7)), i);
      writeSync(fd, part, 0, CHUNK, at);
    }
    closeSync(fd);
  }

  startSnapshot(): Started {
    return this.b2.start(['--json', 'snapshot', this.image, '--volume', `host/${this.name}`]);
  }

  startPrune(): Started {
    let child: ChildProcess | undefined;
    const args = ['--input-type=module', '-e', PRUNE, DIST, this.b2.repository, this.keyFile ?? ''];
    const ended = new Promise<Ended>((resolve) => {
      child = execFile(process.execPath, args, (error, stdout, stderr) => {
        const code = error === null ? 0 : typeof error.code === 'number' ? error.code : undefined;
        resolve({ code, signal: error?.signal ?? undefined, stdout, stderr });
      });
    });
    if (child === undefined) throw new Error('no child');
    return { child, ended };
  }

  startRestore(): Started {
    return this.b2.start(['--json', 'restore', `host/${this.name}`, this.target, '--force']);
  }

  get target(): string {
    return this.dir.join(`${this.name}.restored`);
  }

  /** Notes what a snapshot said. */
  heard(done: Ended): void {
    const answer = answerOf(done);
    if (answer === undefined) {
      if (done.signal === undefined)
        throw new Error(`snapshot ended with ${done.code}: ${done.stderr}`);
      return;
    }
    if (answer['notExact'] !== undefined) throw new Error(`not exact: ${done.stdout}`);
    this.promised.set(Number(String(answer['id']).slice(1)), digestOf(this.data));
  }

  private async opened<T>(work: (repo: Repository) => Promise<T>): Promise<T> {
    const random = (n: number): Uint8Array =>
      Uint8Array.from({ length: n }, () => Math.floor(this.random() * 256));
    const env = { clock: systemClock, random, owner: currentIdentity() };
    const secrets: Secret[] =
      this.keyFile === undefined
        ? []
        : [
            {
              kind: 'keyFile',
              material: parseKeyFile(readFileSync(this.keyFile, 'utf8'), this.keyFile),
              source: 'the test',
            },
          ];
    const repo = await Repository.open(await openDirectoryStore(this.b2.repository), secrets, env);
    try {
      return await work(repo);
    } finally {
      await repo.close();
    }
  }

  /** Every promised point is listed; the newest, and what was written of the one after it, restore (`all`: all of them). */
  async check(all = false): Promise<number> {
    return this.opened(async (repo) => {
      const [volume] = await listVolumes(repo, (text) => {
        throw new Error(text);
      });
      if (volume === undefined) {
        expect(this.promised.size).toBe(0);
        return 0;
      }
      const history = await VolumeHistory.open(repo, volume.id);
      try {
        expect(history.problems).toEqual([]);
        history.refuseGap();
        const shown: number[] = [];
        for await (const c of new Timeline(history.sources).list({ minClass: PointClass.none }))
          shown.push(c.seq);
        for (const seq of this.promised.keys())
          expect(shown, `promised point ${seq}`).toContain(seq);
        const now = digestOf(this.data);
        const last = shown.at(-1) ?? 0;
        // A commit that nobody was told of has captured the image as it is: it has not changed since the command began.
        if (last > this.newest && !this.promised.has(last)) this.promised.set(last, now);
        this.newest = Math.max(this.newest, last);
        const wanted = all ? [...this.promised.keys()] : shown.slice(-1);
        for (const seq of wanted) {
          const image = await openImage(history, testMeta(volume.id, IMAGE_BYTES), seq);
          const restored = Buffer.alloc(image.sizeBytes, 0xee);
          await image.read(restored, 0);
          if (digestOf(restored) !== this.promised.get(seq))
            throw new Error(`point ${seq} does not restore bit for bit`);
        }
        return wanted.length;
      } finally {
        await history.close();
      }
    });
  }

  /** A restore that is not disturbed gives the newest point, whatever an earlier one left behind. */
  async restoreNewest(): Promise<void> {
    const done = await this.lives.restore.measure(() => this.startRestore());
    if (done.code !== 0) throw new Error(`restore ended with ${done.code}: ${done.stderr}`);
    expect(digestOf(readFileSync(this.target))).toBe(this.promised.get(this.newest));
  }
}

async function rounds(
  subject: Subject,
  random: () => number,
  counts: Counts,
  upto: number,
): Promise<void> {
  const { lives } = subject;
  subject.heard(await lives.snapshot.measure(() => subject.startSnapshot()));
  await subject.check();
  await subject.restoreNewest();
  for (let run = 0; counts.kills < upto; run++) {
    if (run > MOST_RUNS) throw new Error(`only ${counts.kills} kills in ${run} runs`);
    const kind = random();
    if (kind < 0.72) {
      subject.change(1 + Math.floor(random() * 24));
      subject.heard(
        await killed('snapshot', subject.startSnapshot(), lives.snapshot.moment(random), counts),
      );
    } else if (kind < 0.84) {
      if (random() < 0.3) {
        const done = await lives.prune.measure(() => subject.startPrune());
        if (done.code !== 0) throw new Error(`prune: ${done.stderr}`);
      } else {
        await killed('prune', subject.startPrune(), lives.prune.moment(random), counts);
      }
    } else if (kind < 0.92 || subject.keyFile === undefined) {
      if (random() < 0.3) await subject.restoreNewest();
      else await killed('restore', subject.startRestore(), lives.restore.moment(random), counts);
    } else {
      const file = `${subject.keyFile}.${run}`;
      const start = (): Started =>
        subject.b2.start(['--json', 'key', 'add', '--new-key-file', file]);
      if (random() < 0.3) expect((await lives.keyAdd.measure(start)).code).toBe(0);
      else {
        const done = await killed('key add', start(), lives.keyAdd.moment(random), counts);
        // A key that was promised opens the repository.
        if (answerOf(done) !== undefined) {
          const opened = await subject.b2.start(['--json', 'volumes'], { B2_KEY_FILE: file }).ended;
          expect(opened.code, opened.stderr).toBe(0);
        }
      }
    }
    await subject.check();
    if (run % 12 === 11) {
      // Undisturbed, all goes well.
      subject.change(2);
      subject.heard(await lives.snapshot.measure(() => subject.startSnapshot()));
      await subject.check();
    }
  }
  // At the end the program itself, and every point.
  subject.change(2);
  subject.heard(await subject.startSnapshot().ended);
  await subject.check();
  const done = await subject.startPrune().ended;
  expect(done.code, done.stderr).toBe(0);
  await subject.restoreNewest();
  const verified = await subject.b2.run('verify', '--data', 'all');
  expect(verified.code, verified.stdout + verified.stderr).toBe(0);
}

/** An init that was killed leaves a repository, or a place where init works. */
async function killInits(
  dir: TempDir,
  random: () => number,
  counts: Counts,
  times: number,
): Promise<void> {
  const life = new Life();
  for (let n = 0; n < times; n++) {
    const encrypted = n % 2 === 1;
    const subject = new Subject(dir, `init-${n}`, encrypted, random);
    const start = (): Started => subject.b2.start(subject.initArgs());
    if (n === 0) {
      expect((await life.measure(start)).code).toBe(0);
    } else {
      const done = await killed('init', start(), life.moment(random), counts);
      const isThere = answerOf(done) !== undefined;
      const again = await start().ended;
      if (again.code !== 0) {
        // Then it is there already, whole.
        expect(again.code, again.stderr).toBe(10);
      } else {
        expect(isThere, 'a repository that was promised is gone').toBe(false);
      }
    }
    if (n % 4 === 1) {
      subject.heard(await subject.startSnapshot().ended);
      expect(await subject.check()).toBe(1);
    }
    rmSync(subject.image);
  }
}

describe('kill -9 at any moment', () => {
  it('loses nothing that was promised', { timeout: 600_000 }, async () => {
    await using dir = tempDir();
    const newCounts = (): Counts => ({ kills: 0, before: 0, after: 0, of: new Map() });
    const plain = new Subject(dir, 'plain', false, seeded(SEED));
    const encrypted = new Subject(dir, 'encrypted', true, seeded(SEED + 1));
    for (const subject of [plain, encrypted])
      expect((await subject.b2.start(subject.initArgs()).ended).code).toBe(0);
    const lanes = [newCounts(), newCounts()] as const;
    // Side by side: most of the time goes into starting programs.
    await Promise.all([
      rounds(plain, seeded(SEED + 2), lanes[0], Math.round(KILLS / 2)),
      killInits(dir, seeded(SEED + 3), lanes[1], 20).then(() =>
        rounds(encrypted, seeded(SEED + 4), lanes[1], KILLS - Math.round(KILLS / 2)),
      ),
    ]);
    const counts = newCounts();
    for (const lane of lanes) {
      counts.kills += lane.kills;
      counts.before += lane.before;
      counts.after += lane.after;
      for (const [what, n] of lane.of) counts.of.set(what, (counts.of.get(what) ?? 0) + n);
    }
    let points = 0;
    for (const subject of [plain, encrypted]) points += await subject.check(true);
    const kinds = [...counts.of].map(([what, n]) => `${n} of ${what}`).join(', ');
    console.log(
      `kill -9: ${counts.kills} kills (${kinds}), ${counts.before} before the acknowledgement, ${counts.after} after it; ${points} points restored at the end; seed ${SEED}`,
    );
    expect(counts.kills).toBeGreaterThanOrEqual(KILLS);
    expect(counts.before).toBeGreaterThan(KILLS / 4);
    expect(counts.after).toBeGreaterThan(0);
  });
});
