import { createHash } from 'node:crypto';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';

import { main } from '../../../src/cli.js';
import { systemRandom } from '../../../src/clock.js';
import { COMMANDS } from '../../../src/commands/index.js';
import { packName } from '../../../src/format/names.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import { CaptureStream } from '../../support/capture-stream.js';
import { ManualClock } from '../../support/manual-clock.js';
import { PASSWORD, newModel, seeded, type ModelVolume } from '../../support/model-volume.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const dirs: TempDir[] = [];

afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

const digest = (path: string): string =>
  createHash('sha256').update(readFileSync(path)).digest('hex');

interface Bed {
  readonly dir: TempDir;
  readonly model: ModelVolume;
  b2(...args: readonly string[]): Promise<{ code: number; stdout: string; stderr: string }>;
}

/** A repository on disk with a volume of 30 points. */
async function bed(seed: number): Promise<Bed> {
  const dir = tempDir();
  dirs.push(dir);
  const random = seeded(seed);
  const store = await openDirectoryStore(dir.join('repo'), { create: true });
  const { repo, model, writer } = await newModel(store, random, {
    sizeBytes: 4 * 1024 * 1024 + 1536,
    encrypted: true,
  });
  await model.capture(writer, model.mutate(60), true);
  for (let i = 1; i < 30; i++) await model.capture(writer, model.mutate(4));
  await writer.close();
  await repo.close();
  if (PASSWORD.kind !== 'password') throw new Error('a password is needed');
  const { password } = PASSWORD;
  return {
    dir,
    model,
    async b2(...args) {
      const stdout = new CaptureStream();
      const stderr = new CaptureStream();
      const code = await main(['--repo', dir.join('repo'), ...args], {
        stdout,
        stderr,
        env: { B2_CONFIG: '/dev/null', B2_PASSWORD: password, B2_CACHE_DIR: dir.join('cache') },
        homeDir: dir.path,
        isRoot: false,
        clock: new ManualClock(),
        random: systemRandom,
        abort: new AbortController(),
        commands: COMMANDS,
      });
      return { code, stdout: stdout.text, stderr: stderr.text };
    },
  };
}

describe('b2 restore', () => {
  it('restores any point to a file, and goes from one to another by writing the difference', async () => {
    const { dir, model, b2 } = await bed(1);
    const target = dir.join('out.img');
    const first = model.acknowledged[11];
    const made = await b2('restore', model.volumeId, target, '--at', `#${first?.seq}`, '--json');
    expect(made).toMatchObject({ code: 0 });
    expect(digest(target)).toBe(first?.digest);
    expect(JSON.parse(made.stdout)).toMatchObject({
      volumeId: model.volumeId,
      point: { seq: first?.seq },
      restored: {
        target,
        targetKind: 'file',
        verified: true,
        isWhole: true,
        sizeBytes: first?.sizeBytes,
      },
    });

    const last = model.acknowledged.at(-1);
    expect(await b2('restore', model.volumeId, target)).toMatchObject({ code: 1 });
    const plan = await b2('restore', model.volumeId, target, '--plan');
    expect(plan).toMatchObject({ code: 0 });
    expect(plan.stdout).toMatch(/needs --force: .* holds a file of 4\.0 MiB \(4195840 bytes\)/);
    expect(plan.stdout).toMatch(/nothing was changed/);
    expect(digest(target)).toBe(first?.digest);
    const over = await b2('restore', model.volumeId, target, '--force', '--json');
    expect(over).toMatchObject({ code: 0 });
    expect(digest(target)).toBe(last?.digest);
    const { restored } = JSON.parse(over.stdout) as {
      restored: { written: { compared: boolean; writtenBytes: number } };
    };
    expect(restored.written.compared).toBe(true);
    expect(restored.written.writtenBytes).toBeLessThan(2 * 1024 * 1024);
  });

  it('says in words what it did', async () => {
    const { dir, model, b2 } = await bed(2);
    const { code, stdout, stderr } = await b2(
      'restore',
      model.volumeId,
      dir.join('out.img'),
      '--no-verify',
    );
    expect(code).toBe(0);
    expect(stdout).toMatch(/restored .* to .*out\.img: 4\.0 MiB/);
    expect(stdout).toMatch(/not read back/);
    expect(stderr).toMatch(/point #30 of /);
  });

  it('knows volumes, points and formats it does not have', async () => {
    const { dir, model, b2 } = await bed(3);
    const target = dir.join('out.img');
    expect(await b2('restore', 'no-such', target)).toMatchObject({ code: 4 });
    expect(await b2('restore', model.volumeId, target, '--at', '#99')).toMatchObject({ code: 4 });
    expect(await b2('restore', model.volumeId, target, '--format', 'iso')).toMatchObject({
      code: 2,
    });
    expect(existsSync(target)).toBe(false);
  });

  it('stops at damage with code 5, or goes on with --skip-damaged and ends with code 3', async () => {
    const { dir, model, b2 } = await bed(4);
    const store = await openDirectoryStore(dir.join('repo'));
    let hit = '';
    for await (const { name } of store.list('packs')) hit = name;
    await store.close();
    const id = hit.split('/').at(-1) ?? '';
    const file = dir.join('repo', packName(id));
    const bytes = readFileSync(file);
    bytes[3000] = (bytes[3000] ?? 0) ^ 1;
    writeFileSync(file, bytes);
    const target = dir.join('out.img');
    const stopped = await b2('restore', model.volumeId, target, '--at', '#1');
    expect(stopped).toMatchObject({ code: 5 });
    expect(stopped.stderr).toMatch(new RegExp(`pack ${id}, frame \\d+`));
    const part = await b2(
      'restore',
      model.volumeId,
      target,
      '--at',
      '#1',
      '--skip-damaged',
      '--force',
      '--json',
    );
    expect(part).toMatchObject({ code: 3 });
    const { restored } = JSON.parse(part.stdout) as {
      restored: { isWhole: boolean; written: { damagedRanges: unknown[] } };
    };
    expect(restored.isWhole).toBe(false);
    expect(restored.written.damagedRanges.length).toBeGreaterThan(0);
  });
});
