import { mkdirSync, readFileSync, statSync, symlinkSync, writeFileSync } from 'node:fs';

import { describe, expect, it } from 'vitest';

import { openReadDevice, openWriteDevice, targetKind } from '../../../src/devices/open.js';
import { inUseReasons } from '../../../src/devices/in-use.js';
import { isKind } from '../../../src/errors.js';
import { tempDir } from '../../support/tmp.js';

describe('opening by name', () => {
  it('says what a name is that is no device', async () => {
    await using dir = tempDir();
    await expect(openReadDevice(dir.join('none'))).rejects.toMatchObject({ kind: 'not-found' });
    await expect(openReadDevice(dir.path)).rejects.toMatchObject({
      kind: 'refused',
      message: `${dir.path} is a directory, not a block device or an image file`,
    });
    await expect(openReadDevice('/dev/null')).rejects.toMatchObject({
      kind: 'refused',
      message: '/dev/null is a character device, not a block device or an image file',
    });
  });

  it('follows a link for reading', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('a.img'), 'content');
    symlinkSync('a.img', dir.join('link'));
    const device = await openReadDevice(dir.join('link'));
    expect(device.facts).toMatchObject({
      path: dir.join('link'),
      realPath: dir.join('a.img'),
      sizeBytes: 7,
    });
    await device.close();
  });

  it('creates a target for its owner only, and never over something', async () => {
    await using dir = tempDir();
    const path = dir.join('t.img');
    const device = await openWriteDevice(path, 'new');
    await device.close();
    expect(statSync(path).mode & 0o777).toBe(0o600);
    await expect(openWriteDevice(path, 'new')).rejects.toMatchObject({ kind: 'exists' });
  });

  it('leaves the bytes of an existing target alone until it is written', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('t.img'), 'keep me');
    const device = await openWriteDevice(dir.join('t.img'), 'either');
    await device.close();
    expect(readFileSync(dir.join('t.img'), 'utf8')).toBe('keep me');
    await expect(openWriteDevice(dir.join('none'), 'existing')).rejects.toMatchObject({
      kind: 'not-found',
    });
  });

  it('refuses links, to something and to nothing, as a target', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('victim'), 'precious');
    symlinkSync('victim', dir.join('link'));
    symlinkSync('nowhere', dir.join('dangling'));
    for (const name of ['link', 'dangling']) {
      for (const mode of ['new', 'existing', 'either'] as const) {
        await expect(openWriteDevice(dir.join(name), mode)).rejects.toSatisfy(
          (error) =>
            isKind(error, 'refused') && error.message === `${dir.join(name)} is a symbolic link`,
        );
      }
    }
    expect(readFileSync(dir.join('victim'), 'utf8')).toBe('precious');
    expect(() => statSync(dir.join('nowhere'))).toThrow();
  });

  it('refuses directories, and makes no files in /dev', async () => {
    await using dir = tempDir();
    mkdirSync(dir.join('d'));
    await expect(openWriteDevice(dir.join('d'), 'either')).rejects.toMatchObject({
      kind: 'refused',
    });
    await expect(openWriteDevice('/dev/b2-no-such-disk', 'either')).rejects.toMatchObject({
      kind: 'not-found',
    });
    expect(await targetKind('/dev/b2-no-such-disk')).toBe('none');
  });

  it('lets one program at a time write to a file', async () => {
    await using dir = tempDir();
    const first = await openWriteDevice(dir.join('t.img'), 'new');
    await expect(openWriteDevice(dir.join('t.img'), 'existing')).rejects.toMatchObject({
      kind: 'refused',
    });
    await first.close();
    await (await openWriteDevice(dir.join('t.img'), 'existing')).close();
  });

  it('finds a target inside the repository', async () => {
    await using dir = tempDir();
    mkdirSync(dir.join('repo/packs'), { recursive: true });
    const inside = dir.join('repo/packs/x');
    expect(await inUseReasons(inside, { repositoryPath: dir.join('repo') })).toEqual([
      { kind: 'repository', text: `${inside} lies inside the repository ${dir.join('repo')}` },
    ]);
    expect(
      await inUseReasons(dir.join('repository.img'), { repositoryPath: dir.join('repo') }),
    ).toEqual([]);
  });
});
